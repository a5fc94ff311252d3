"""What stood where a patch is now."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from asl_vllm.engine.patching import MARK


def original_of(owner: type | ModuleType, name: str) -> Callable[..., Any] | None:
    """The wrapped original of a patched method; None where it is not patched."""
    raw = inspect.getattr_static(owner, name)
    original: Callable[..., Any] | None = getattr(
        getattr(raw, "__func__", raw), MARK, None
    )
    return original
