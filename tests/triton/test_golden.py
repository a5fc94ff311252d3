"""The whole rule with the Triton ops, against the authors' implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from torch import Tensor

from asl_kernels import rank_variance, window_scores
from asl_kernels.rank_variance import triton as rank_variance_triton
from asl_kernels.window_scores import triton as window_scores_triton
from asl_kernels.window_scores.triton import launch
from asl_vllm_testing.golden import CASES
from asl_vllm_testing.golden.checks import CHECKS, replayed
from tests.triton.device import INTERPRETED, on_device


@pytest.fixture(autouse=True)
def _triton_in_place_of_the_references(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[list[str]]:
    """The wrappers' CPU route runs the interpreted kernels; notes each call."""
    calls: list[str] = []

    def through(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            calls.append(name)
            given = [on_device(x) if isinstance(x, Tensor) else x for x in args]
            found = kernel(*given).cpu()
            for there, here in zip(given, args, strict=True):
                if isinstance(there, Tensor) and isinstance(here, Tensor):
                    here.copy_(there)  # the layer score is written
            return found

        return call

    if INTERPRETED:
        # Larger tiles than a GPU's, for fewer steps.
        blocks = {"BLOCK_DIM": 128, "BLOCK_ROWS": 128, "BLOCK_KEYS": 256}
        monkeypatch.setattr(launch, "block_sizes", lambda *_, **__: (blocks, {}))
    # There may be no GPU whose processors could be counted.
    scores = partial(window_scores_triton.window_scores, programs=4)
    for wrapper, kernel, name in (
        (window_scores.reference, scores, "window_scores"),
        (rank_variance.reference, rank_variance_triton.rank_variance, "rank_variance"),
    ):
        monkeypatch.setattr(wrapper, name, through(name, kernel))
    replayed.cache_clear()
    yield calls
    replayed.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recording(
    case: int, _triton_in_place_of_the_references: list[str]
) -> None:
    for check in CHECKS:
        check(case)
    assert set(_triton_in_place_of_the_references) == {"window_scores", "rank_variance"}
