"""Kernels that some work would launch on a GPU, and waits of the host for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts operations that compute; views and new tensors launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tags = (func.namespace, func.__name__.partition(".")[0])
        if not func.is_view and tags[1] not in ("empty", "empty_like", "detach"):
            self.names.append("::".join(tags))
        return result


WAITING = ("_local_scalar_dense", "nonzero", "masked_select")
"""Operations whose result the host needs, or its size: ``item``, ``if``."""


@contextmanager
def waits() -> Iterator[list[str]]:
    """What would have the host wait for the device meanwhile, in order."""
    found: list[str] = []
    read = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        found.append("tolist")
        return read(self)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.__name__.partition(".")[0]
            indices = args[1] if name == "index" else ()
            masks = any(i is not None and i.dtype == torch.bool for i in indices)
            if name in WAITING or masks:
                found.append(name)
            return func(*args, **(kwargs or {}))

    with Mode(), patch.object(Tensor, "tolist", tolist):
        yield found
