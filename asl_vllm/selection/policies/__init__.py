"""The policies, by the names that ``--kv-policy`` takes.

`POLICIES` is the table of those in this package; other packages add theirs under the
entry-point group ``asl_vllm.policies`` (docs/policies.md).
"""

from __future__ import annotations

from asl_vllm.config import AslConfig, ConfigError
from asl_vllm.selection.policies.asl import AslPolicy
from asl_vllm.selection.policies.base import Keep, LayerDecision, Policy
from asl_vllm.selection.policies.fastkv import FastKvPolicy
from asl_vllm.selection.policies.gemfilter import GemFilterPolicy
from asl_vllm.selection.policies.installed import policies_of_packages
from asl_vllm.selection.policies.pyramidinfer import PyramidInferPolicy
from asl_vllm.selection.policies.snapkv import SnapKvPolicy

POLICIES: dict[str, type[Policy]] = {
    "asl": AslPolicy,
    "fastkv": FastKvPolicy,
    "gemfilter": GemFilterPolicy,
    "pyramidinfer": PyramidInferPolicy,
    "snapkv": SnapKvPolicy,
}
"""The policies of this package; ``none`` is the absence of one."""


def installed_policies() -> dict[str, type[Policy]]:
    """Every policy that prunes: ours, and those of installed packages.

    Raises:
        ConfigError: An installed package names something else under our entry-point
            group, or takes a name that is taken.
    """
    return {**POLICIES, **policies_of_packages()}


def policies_beside_windows() -> list[str]:
    """Names of those that models with sliding windows can have: none that restarts.

    Tokens that start over are nearer to each other than in the prompt, so windows would
    see others.
    """
    return [name for name, kind in installed_policies().items() if not kind.restarts]


def make_policy(
    name: str, config: AslConfig, *, num_layers: int, kept_tokens: int
) -> Policy:
    """Makes the policy object of one prompt.

    Args:
        name: A key of `installed_policies`; may differ from ``config.policy``.
        config: The options.
        num_layers: L, the model's depth.
        kept_tokens: k, tokens a layer keeps, the window included.

    Raises:
        ConfigError: No policy has that name, or see `installed_policies`.
        ValueError: ``kept_tokens`` leaves nothing beside the window.
    """
    policies = installed_policies()
    policy = policies.get(name)
    if policy is None:
        raise ConfigError(
            f"kv policy: got {name!r}; allowed where prompts are pruned: "
            f"{', '.join(policies)}."
        )
    return policy(config, num_layers=num_layers, kept_tokens=kept_tokens)


__all__ = [
    "POLICIES",
    "Keep",
    "LayerDecision",
    "Policy",
    "installed_policies",
    "make_policy",
    "policies_beside_windows",
]
