"""The policies, by the names that ``--kv-policy`` takes."""

from __future__ import annotations

from asl_vllm.config import AslConfig, ConfigError
from asl_vllm.selection.policies.asl import AslPolicy
from asl_vllm.selection.policies.base import LayerDecision, Policy
from asl_vllm.selection.policies.snapkv import SnapKvPolicy

POLICIES: dict[str, type[Policy]] = {"asl": AslPolicy, "snapkv": SnapKvPolicy}
"""Every policy that prunes; ``none`` is the absence of one."""


def make_policy(
    name: str, config: AslConfig, *, num_layers: int, kept_tokens: int
) -> Policy:
    """Makes the policy object of one prompt.

    Args:
        name: A key of `POLICIES`; may differ from ``config.policy``.
        config: The options.
        num_layers: L, the model's depth.
        kept_tokens: k, tokens a layer keeps, the window included.

    Raises:
        ConfigError: No policy has that name.
        ValueError: ``kept_tokens`` leaves nothing beside the window.
    """
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigError(
            f"kv policy: got {name!r}; allowed where prompts are pruned: "
            f"{', '.join(POLICIES)}."
        )
    return policy(config, num_layers=num_layers, kept_tokens=kept_tokens)


__all__ = [
    "POLICIES",
    "AslPolicy",
    "LayerDecision",
    "Policy",
    "SnapKvPolicy",
    "make_policy",
]
