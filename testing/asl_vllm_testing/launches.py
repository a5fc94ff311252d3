"""How many kernels some work would launch on a GPU."""

from __future__ import annotations

from typing import Any

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
