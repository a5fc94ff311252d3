"""Scores of several prompts' layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.config import AslConfig
from asl_vllm.selection.policies import Policy


def scores_alike(policy: Policy) -> bool:
    """Whether a policy scores as SnapKV does, with the options of the server."""
    return type(policy).score is Policy.score


def score_together(
    config: AslConfig,
    window_queries: Tensor,
    keys: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> list[tuple[Tensor, Tensor]]:
    """What `Policy.score` returns of each prompt, by one launch of each kernel.

    Args:
        config: The options that all share.
        window_queries: ``[n * W, H, D]``, prompt after prompt, as the keys.
        keys: ``[sum(M), Hkv, D]``.
        lengths: M of each.
        scale: The layer's factor on ``q @ k``.
    """
    window = len(window_queries) // len(lengths)
    columns = [length - window for length in lengths]
    layer_score = torch.empty(sum(columns), dtype=torch.float32, device=keys.device)
    head_scores = window_scores(
        window_queries,
        keys,
        scale=scale,
        pool_kernel=config.pool_kernel,
        reach=config.reach,
        lengths=lengths,
        layer_score=layer_score,
    )
    of_heads = torch.split(head_scores, columns, dim=1)
    return list(zip(of_heads, torch.split(layer_score, columns), strict=True))
