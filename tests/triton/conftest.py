"""These tests run on their own: ``TRITON_INTERPRET=1 pytest tests/triton``.

The variable makes `triton.jit` build interpreted functions wherever Triton is first
imported. In the process of the other tests vLLM asks whether Triton and a GPU driver
are there and chooses its kernels by the answer; an interpreted Triton must not leak
into that.

On a machine with an NVIDIA GPU they run compiled, and on it, without the variable.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.triton.device import RUNNABLE

collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is NaN, and random numbers are the same each time."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
