"""Layers called eagerly, with vLLM's fused kernels, whatever its compilation mode.

Touch points: `CustomOp` with ``_forward_method`` and ``forward_cuda``, and the
priorities of `vllm.ir` operations. Where vLLM compiles a model it leaves norms, rotary
and activations to the compiler. A pass calls layers outside the compiled model, where
the same operations would be ten times as many kernels, and some would be compiled one
by one while requests wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import vllm.kernels  # noqa: F401  # registers what ir operations may be run by
from vllm import ir
from vllm.ir.op import IrOp
from vllm.model_executor.custom_op import CustomOp
from vllm.platforms import current_platform

_PROVIDER = "vllm_c"
"""vLLM's own kernels, the first choice where it does not compile."""


class FusedLayers:
    """Makes `running` layers use the kernels that they use where nothing compiles.

    On other platforms than CUDA they run as they are.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        self._methods: list[tuple[CustomOp, Callable[..., Any]]] = []
        self._priorities: list[tuple[IrOp, list[str]]] = []
        if current_platform.is_cuda():
            self._take(layers)

    def _take(self, layers: Iterable[torch.nn.Module]) -> None:
        ops = {
            id(module): module
            for layer in layers
            for module in layer.modules()
            if isinstance(module, CustomOp)
        }
        for op in ops.values():
            own = op.forward_cuda
            defined = type(op).forward_cuda is not CustomOp.forward_cuda
            if defined and op._forward_method != own:
                self._methods.append((op, own))
        for operation in IrOp.registry.values():
            kernel = operation.impls.get(_PROVIDER)
            before = operation.get_priority()
            if kernel is None or not kernel.supported or _PROVIDER in before:
                continue
            others = [name for name in before if name != "native"]
            self._priorities.append((operation, [*others, _PROVIDER, "native"]))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around calls of the layers, on the thread that runs the model."""
        stock = [op._forward_method for op, _ in self._methods]
        with ExitStack() as stack:
            # What the compiler needs to see is of no use here, and takes time.
            stack.enter_context(ir.enable_torch_wrap(False))
            for operation, priority in self._priorities:
                stack.enter_context(operation.set_priority(priority))
            try:
                # Past Module.__setattr__, which is slow.
                for op, own in self._methods:
                    op.__dict__["_forward_method"] = own
                yield
            finally:
                for (op, _), method in zip(self._methods, stock, strict=True):
                    op.__dict__["_forward_method"] = method
