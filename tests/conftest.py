"""Settings that must be made before torch and vLLM are imported; workers' shares."""

from __future__ import annotations

import os

import pytest

# The models of the tests are too small to share among threads, and threads that
# spin for each other are slow where cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In-process engine core; no network; no pinning to cores that others use too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divides the tests among the workers of `make test`, the long ones first.

    A file is a share, as engines are its fixtures. Where servers and engines of several
    processes are started, the group "servers" is one, so that two never meet.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            folder = item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(f"{folder}/{item.path.stem}"))

    def turn(item: pytest.Item) -> int:
        (name,) = item.get_closest_marker("xdist_group").args  # type: ignore[union-attr]
        return 0 if name == "servers" else 1 if name.startswith("e2e/") else 2

    items.sort(key=turn)
