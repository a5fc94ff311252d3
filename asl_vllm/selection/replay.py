"""Replays a policy on recorded queries and keys, without an engine."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from asl_kernels.rank_variance import descending_ranks
from asl_vllm.config import AslConfig
from asl_vllm.selection.deciding import FiniteCheck, decide, read_together
from asl_vllm.selection.policies import make_policy


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayResult:
    """What the rule did to a prompt, layer by layer, up to the selection layer."""

    ranks: Tensor
    """int64 ``[n, T]``: ranks in each layer that the policy scored, which are all but
    for gemfilter; 1 is the highest score. T is N - W, for gemfilter N - 1."""
    ratios: tuple[float, ...]
    """Relative rank variance of each checked layer, from ``l_min`` on."""
    selection_layer: int | None
    """0-based; None: no layer triggered."""
    kept: tuple[Tensor, ...]
    """Per layer int64 ``[Hkv, k]``: the tokens each KV head keeps, ascending. Empty
    for gemfilter: what a restart computes is not in a recording."""
    deeper: Tensor | None
    """int64 ``[p]``: the tokens that go deeper or start over, ascending; None: all."""


def replay(
    window_queries: Tensor,
    keys: Tensor,
    config: AslConfig,
    *,
    budget: int,
    num_layers: int | None = None,
) -> ReplayResult:
    """Applies ``config.policy`` to a prompt's queries and keys.

    Stops at the first layer that drops tokens, since deeper keys would be those of
    fewer, and those of a restart are others.

    Args:
        window_queries: ``[L, H, W, D]`` of the last W tokens, rotary applied.
        keys: ``[L, Hkv, N, D]`` of all N tokens, rotary applied.
        config: The options; ``window`` is W.
        budget: k, tokens kept per layer, taken exactly (no block alignment);
            W + 1 to N.
        num_layers: The model's depth where not all its layers are given.

    Raises:
        ConfigError: ``config.policy`` prunes nothing.
        SelectionError: Scores are not finite.
        ValueError: Shapes or a budget that do not fit.
    """
    if window_queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(
            f"window_queries, keys: got shapes {tuple(window_queries.shape)}, "
            f"{tuple(keys.shape)}; wanted [L, H, W, D] and [L, Hkv, N, D]."
        )
    given, _, window, dim = window_queries.shape
    if keys.shape[0] != given or given == 0:
        raise ValueError(
            f"window_queries, keys: got {given} and {keys.shape[0]} layers; wanted "
            "as many, at least one."
        )
    if window != config.window:
        raise ValueError(
            f"window_queries: got W = {window}; the config's window is {config.window}."
        )
    policy = make_policy(
        config.policy, config, num_layers=num_layers or given, kept_tokens=budget
    )
    finite = FiniteCheck()
    ranks: list[Tensor] = []
    ratios: list[float] = []
    kept: list[Tensor] = []
    for layer in range(given):
        scores = policy.score(
            layer,
            window_queries[layer].transpose(0, 1),
            keys[layer].transpose(0, 1),
            dim**-0.5,
        )
        if scores is None:
            continue
        head_scores, layer_score = scores
        decision = decide(
            policy, layer, keys.shape[2], layer_score, head_scores, finite
        )
        ranks.append(descending_ranks(layer_score))
        if isinstance(decision.kept, Tensor):
            kept.append(decision.kept)
        if decision.ratio is not None:
            ratios.append(decision.ratio)
        if isinstance(decision.deeper, Tensor):
            return ReplayResult(
                torch.stack(ranks),
                tuple(ratios),
                layer,
                tuple(kept),
                decision.deeper,
            )
    read_together([finite.read()])
    if not ranks:
        raise ValueError(
            f"window_queries, keys: got {given} layers, of which {config.policy} looks "
            "at none; wanted those up to its selection layer."
        )
    return ReplayResult(torch.stack(ranks), tuple(ratios), None, tuple(kept), None)
