"""Which engine this process serves, for what is asked before a request reaches one."""

from __future__ import annotations

from vllm.config import VllmConfig

from asl_vllm.engine.settings import Settings, settings_of

_served: VllmConfig | None = None


def serve(vllm_config: VllmConfig) -> None:
    """Notes the engine."""
    global _served
    _served = vllm_config


def served() -> Settings | None:
    """The engine's settings; None before one is configured."""
    return None if _served is None else settings_of(_served)


def pruning() -> bool:
    """Whether it has a policy."""
    settings = served()
    return settings is not None and settings.config.enabled
