"""Recordings of the authors' published implementation.

A case is one prompt: queries and keys of every layer, the settings, and what the
implementation made of them: ``ranks``, ``ratios``, ``selected_layer`` (-1: none),
``selected`` tokens and the ``kept`` ones of each head.

``smollm2.json`` is nine natural prompts of a real model, `asl_vllm_testing.real_model`.
The implementation was given the model's own queries and keys, computed in float32 from
the bfloat16 weights with transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

CASES = range(4)


@functools.cache
def recording(case: int) -> dict[str, Any]:
    """The arrays of a case by name, and its ``config`` as a dict."""
    with np.load(Path(__file__).parent / f"case{case}.npz") as arrays:
        recorded: dict[str, Any] = dict(arrays)
    recorded["config"] = json.loads(str(recorded["config"]))
    return recorded


@functools.cache
def real_prompts() -> list[dict[str, Any]]:
    """Prompts of the real model, and what the implementation made of them.

    ``ids``; the settings, of which ``budget`` was asked for and ``kept`` is what blocks
    of 32 tokens leave of it; ``selection_layer``, None where no layer's ranks settled,
    and then ``selected``, the tokens that go deeper, window included.
    """
    path = Path(__file__).parent / "smollm2.json"
    prompts: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return prompts
