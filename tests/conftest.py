"""Settings that must be made before torch and vLLM are imported; workers' shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The models of the tests are too small to share among threads, and threads that
# spin for each other are slow where cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In-process engine core; no network; no pinning to cores that others use too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# How long an example takes says nothing where others share the cores.
settings.register_profile("shared cores", settings.default, deadline=None)
settings.load_profile("shared cores")

SERVERS = frozenset(
    {
        "test_batch_runner",
        "test_data_parallel",
        "test_endpoints",
        "test_examples",
        "test_faults",
        "test_fuzz",
        "test_pauses",
        "test_prometheus",
        "test_readme",
        "test_server",
        "test_service",
        "test_service_endings",
        "test_service_scaled",
        "test_tensor_parallel",
        "test_wheel",
    }
)
"""Files of tests/e2e that start servers, or engines of several processes."""


def _share(nodeid: str) -> str:
    """The share of the tests that one worker runs: a file, as engines are its fixtures.

    `SERVERS` are one share, so that two never meet.
    """
    file = nodeid.partition("::")[0]
    return "servers" if Path(file).stem in SERVERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divides the tests among the workers of `make test` by `_share`.

    xdist's own groups ride on node ids, which pytest 9.2 does not let it change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _share(nodeid)

    return Shares(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that both workers end together."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return

    def turn(item: pytest.Item) -> int:
        if _share(item.nodeid) == "servers":
            return 0
        return 1 if item.path.parent.name == "e2e" else 2

    items.sort(key=turn)
