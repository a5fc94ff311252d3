"""Recordings of the authors' published implementation.

A case is one prompt: queries and keys of every layer, the settings, and what the
implementation made of them: ``ranks``, ``ratios``, ``selected_layer`` (-1: none),
``selected`` tokens and the ``kept`` ones of each head.
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
