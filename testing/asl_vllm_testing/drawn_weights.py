"""Random weights for models that have none, of use to tell right from wrong."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader


def _draw(model: nn.Module) -> None:
    """Weights that make hidden states of size 1 and attention that is peaked."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        numbers = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            numbers *= 1.5 * parameter.shape[-1] ** -0.5
        elif name.endswith("weight"):  # a norm's
            numbers = 1 + 0.1 * numbers
        else:
            numbers *= 0.1
        parameter.data.copy_(numbers)


def _load_weights(_: Any, model: nn.Module, model_config: Any) -> None:
    _draw(model)


@contextmanager
def random_weights() -> Iterator[None]:
    """vLLM's dummy weights are ones that tell a right model from a wrong one.

    Its own are all nearly 0. They are the same in every engine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DummyModelLoader, "load_weights", _load_weights)
        yield
