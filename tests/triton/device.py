"""Where the kernels run: interpreted on the CPU, or compiled on a GPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

# Against the reference on the same rounded inputs, relative to the largest score: all
# arithmetic is fp32 whatever the dtype, and only the order of sums differs. A GPU's
# exp2 is an approximation, and its tensor cores cut sums off instead of rounding.
TOLERANCES = (
    {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
    if INTERPRETED
    else {torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
)


def on_device(tensor: Tensor) -> Tensor:
    """The same there, strides included; on a CPU the tensor itself."""
    if DEVICE.type == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.as_strided((size,), (1,), 0).to(DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that nobody has written to, so that on a CPU next to none is used."""
    memory = torch.UntypedStorage(size * dtype.itemsize, device=DEVICE)
    return torch.empty(0, dtype=dtype, device=DEVICE).set_(memory, 0, (size,), (1,))
