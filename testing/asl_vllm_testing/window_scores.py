"""Window scores by a loop in double precision, and errors against them."""

from __future__ import annotations

import torch
from torch import Tensor

# Against the truth on the rounded inputs (all arithmetic is fp32), and against the
# truth on the inputs before rounding; relative to the largest score.
TOLERANCES = {
    torch.float32: (3e-6, 3e-6),
    torch.float16: (3e-6, 5e-3),
    torch.bfloat16: (3e-6, 4e-2),
}


def naive(
    q: Tensor,
    k: Tensor,
    scale: float,
    pool_kernel: int,
    row_weights: Tensor | None = None,
    reach: int = 1,
) -> Tensor:
    window, heads, _ = q.shape
    tokens, kv_heads, _ = k.shape
    prefix = tokens - window
    scores = torch.zeros(kv_heads, prefix, dtype=torch.float64)
    for head in range(heads):
        keys = k[:, head * kv_heads // heads].double()
        mass = torch.zeros(prefix, dtype=torch.float64)
        for row in range(window):
            logits = keys[: prefix + row + 1] @ q[row, head].double() * scale
            weight = 1.0 if row_weights is None else float(row_weights[row])
            mass += weight * logits.softmax(0)[:prefix]
        half = pool_kernel // 2
        for token in range(prefix):
            near = mass[max(0, token - half) : token + half + 1]
            scores[head * kv_heads // heads, token] += near.sum() / pool_kernel
    reached = [scores[:, max(0, t + 1 - reach) : t + 1].amax(1) for t in range(prefix)]
    return torch.stack(reached, 1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())
