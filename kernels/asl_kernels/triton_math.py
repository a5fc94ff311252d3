"""What Triton kernels share: products in fp32, and numbers for a softmax by exp2."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter cannot multiply bf16 (3.9); the fp32 products are the same.
_FP32_DOTS = tl.constexpr(triton.knobs.runtime.interpret)
# Stands for minus infinity: below any logit, and its differences stay finite.
LOWEST = tl.constexpr(-8.5e37)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def dot(b_left: tl.tensor, b_right: tl.tensor, b_sum: tl.tensor) -> tl.tensor:
    """``b_sum + b_left @ b_right`` in fp32: no TF32; mixed dtypes meet in fp32."""
    if b_left.dtype != b_right.dtype or _FP32_DOTS:
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, acc=b_sum, input_precision="ieee")
