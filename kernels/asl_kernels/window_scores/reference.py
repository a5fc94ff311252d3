"""Window scores in plain torch: the truth that kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def window_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    pool_kernel: int,
    lengths: Sequence[int] | None = None,
    layer_score: Tensor | None = None,
    row_weights: Tensor | None = None,
    reach: int = 1,
) -> Tensor:
    """See `asl_kernels.window_scores.window_scores`; arguments are checked there."""
    if lengths is None:
        lengths = (k.shape[0],)
    queries, keys = q.chunk(len(lengths)), torch.split(k, list(lengths))
    scores = [
        _score_one(rows, own, scale, pool_kernel, row_weights, reach)
        for rows, own in zip(queries, keys, strict=True)
    ]
    together = scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)
    if layer_score is not None:
        torch.sum(together, dim=0, out=layer_score)
    return together


def _score_one(
    q: Tensor,
    k: Tensor,
    scale: float,
    pool_kernel: int,
    row_weights: Tensor | None,
    reach: int,
) -> Tensor:
    """Scores ``[Hkv, M - W]`` of one request, q ``[W, H, D]``, k ``[M, Hkv, D]``."""
    window, heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    group = heads // kv_heads
    prefix = tokens - window
    # Window row i sees keys 0 to prefix + i: only the last columns need a mask.
    future = torch.ones(window, window, dtype=torch.bool, device=q.device).triu_(1)
    queries = (q.float() * scale).permute(1, 0, 2).reshape(kv_heads, -1, dim)
    scores = torch.empty(kv_heads, prefix, dtype=torch.float32, device=q.device)
    # A KV head at a time, in buffers that all heads share: neither K in fp32 nor the
    # attention of all heads is ever held at once, and no head pays for fresh pages.
    logits = torch.empty(group * window, tokens, dtype=torch.float32, device=q.device)
    weights = torch.empty_like(logits)
    for head in range(kv_heads):
        torch.mm(queries[head], k[:, head].float().t(), out=logits)
        by_row = logits.view(group, window, tokens)
        # The window's own keys only serve to normalize.
        by_row[..., prefix:].masked_fill_(future, float("-inf"))
        torch.softmax(logits, dim=-1, out=weights)
        attention = weights.view(group, window, tokens)[..., :prefix]
        if row_weights is not None:
            attention.mul_(row_weights[:, None])
        mass = attention.sum(dim=1)
        pooled = F.avg_pool1d(mass, pool_kernel, stride=1, padding=pool_kernel // 2)
        torch.sum(pooled, dim=0, out=scores[head])
    return reaching(scores, reach)


def reaching(scores: Tensor, reach: int) -> Tensor:
    """The largest of the ``reach`` scores that end with each token's, ``[Hkv, n]``."""
    if reach == 1:
        return scores
    # No score is below 0, what is padded.
    return F.max_pool1d(F.pad(scores, (reach - 1, 0)), reach, stride=1)
