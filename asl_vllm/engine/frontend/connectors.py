"""Which KV connectors an engine with a policy has: ours, alone or beside another.

Touch points: vLLM's ``KVTransferConfig`` and ``--kv-offloading-size``, for which vLLM
would install its ``OffloadingConnector`` in place of ours.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import vllm.envs as envs
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from asl_vllm.engine.compat import UnsupportedError

CONNECTOR_MODULE = "asl_vllm.engine.connector"
CONNECTOR_NAME = "AslConnector"
MULTI_MODULE = "asl_vllm.engine.multi_connector"
MULTI_NAME = "AslMultiConnector"
BESIDE = "OffloadingConnector"
"""vLLM's connector that may run beside ours."""

_GIB = 1 << 30


def connector_config() -> KVTransferConfig:
    """The ``kv_transfer_config`` that installs our connector.

    The role is kv_producer because our loads run on the engine's own stream, in
    order with its steps; as a consumer vLLM would hold freed blocks back for loads
    that are not. A failed load fails its request instead of being retried unpruned.
    """
    return KVTransferConfig(
        kv_connector=CONNECTOR_NAME,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_producer",
        kv_load_failure_policy="fail",
    )


def beside_config(other: dict[str, Any]) -> KVTransferConfig:
    """The ``kv_transfer_config`` that installs our connector beside ``other``.

    The role is that of `connector_config`: the other one's copies wait for the
    engine's stream before they write to blocks.
    """
    return dataclasses.replace(
        connector_config(),
        kv_connector=MULTI_NAME,
        kv_connector_module_path=MULTI_MODULE,
        kv_connector_extra_config={"connectors": [_plain(connector_config()), other]},
    )


def take(engine_args: EngineArgs) -> None:
    """Has an engine use our connector, beside the one that the arguments name.

    Raises:
        UnsupportedError: they name one that does not work beside ours.
    """
    # vLLM refuses it for any connector, in words about a network that we do not use.
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    exempt = engine_args.enable_cumem_allocator or engine_args.enable_sleep_mode
    if "expandable_segments:True" in allocator and not exempt:
        raise UnsupportedError(
            "a KV connector, which vLLM runs with plain allocations only",
            f"PYTORCH_CUDA_ALLOC_CONF={allocator}",
            "take expandable_segments out of it, or pass --enable-cumem-allocator",
        )
    given = engine_args.kv_transfer_config
    if isinstance(given, dict):
        given = KVTransferConfig(**given)
    if given and given.kv_connector_module_path in (CONNECTOR_MODULE, MULTI_MODULE):
        return
    others = [*_named(given), *_of_size(engine_args)]
    for other in others:
        _check(other)
    if len(others) > 1:
        raise UnsupportedError(
            "at most one KV connector beside its own",
            " and ".join(other["kv_connector"] for other in others),
            "name one of them",
        )
    engine_args.kv_offloading_size = None
    engine_args.kv_transfer_config = (
        beside_config(others[0]) if others else connector_config()
    )


def _named(given: KVTransferConfig | None) -> list[dict[str, Any]]:
    """The connectors of ``--kv-transfer-config``, less ours."""
    if given is None or given.kv_connector is None:
        return []
    if given.kv_connector != "MultiConnector" or given.kv_connector_module_path:
        return [_plain(given)]
    children = given.kv_connector_extra_config.get("connectors", [])
    policy = given.kv_load_failure_policy
    return [
        {"kv_load_failure_policy": policy, **child}
        for child in children
        if child.get("kv_connector_module_path") != CONNECTOR_MODULE
    ]


def _of_size(engine_args: EngineArgs) -> list[dict[str, Any]]:
    """The connector that vLLM would install for ``--kv-offloading-size``."""
    size = engine_args.kv_offloading_size
    if size is None:
        return []
    name = BESIDE
    if engine_args.kv_offloading_backend == "lmcache":
        name = "LMCacheMPConnector"
    elif envs.VLLM_USE_SIMPLE_KV_OFFLOAD:
        name = "SimpleCPUOffloadConnector"
    return [
        {
            "kv_connector": name,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": size * _GIB},
        }
    ]


def _check(other: dict[str, Any]) -> None:
    name = other.get("kv_connector")
    module = other.get("kv_connector_module_path")
    if name != BESIDE or module:
        where = f" of {module}" if module else ""
        raise UnsupportedError(
            f"no KV connector beside its own but vLLM's {BESIDE}",
            f"{name!r}{where}",
            f"name {BESIDE}, or drop --kv-transfer-config and --kv-offloading-size",
        )
    if other.get("kv_load_failure_policy", "fail") != "fail":
        raise UnsupportedError(
            'kv_load_failure_policy "fail": a failed prompt is not retried unpruned',
            f"{other['kv_load_failure_policy']!r}",
            "drop kv_load_failure_policy from --kv-transfer-config",
        )
    budget = other.get("kv_connector_extra_config", {}).get("sync_load_budget_bytes")
    if budget:
        raise UnsupportedError(
            "loads that do not hold up a step, since its passes come after them",
            f"sync_load_budget_bytes {budget}",
            "drop sync_load_budget_bytes from kv_connector_extra_config",
        )


def _plain(config: KVTransferConfig) -> dict[str, Any]:
    """As a ``MultiConnector`` takes it, which adds the engine's own id."""
    data = dataclasses.asdict(config)
    del data["engine_id"]
    return data
