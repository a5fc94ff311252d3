"""Argument checks shared by the wrappers; each raises a ValueError that says what."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, layout: str, *sizes: int | None) -> None:
    """Checks the number of dimensions and the sizes that are not None.

    ``layout`` names the dimensions for the message, as in ``"[M, Hkv, D]"``.
    """
    shape = tuple(tensor.shape)
    if len(shape) == len(sizes) and all(
        want is None or got == want for got, want in zip(shape, sizes, strict=True)
    ):
        return
    wanted = ", ".join("any" if size is None else str(size) for size in sizes)
    raise ValueError(f"{name}: got shape {shape}; wanted {layout} = ({wanted}).")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Checks that the dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name}: got {tensor.dtype}; allowed: {names}.")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Checks that the tensor lies on ``device``, where the other arguments lie."""
    if tensor.device != device:
        raise ValueError(
            f"{name}: on {tensor.device}, the other arguments on {device}; "
            "move them to one device."
        )


def check_rows_contiguous(name: str, tensor: Tensor) -> None:
    """Checks that the last dimension is contiguous; the others may be strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: the last dimension has stride {tensor.stride(-1)}; wanted 1 "
            "(pass a contiguous copy)."
        )
