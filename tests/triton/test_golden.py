"""The whole rule with the Triton ops, against the authors' implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asl_kernels import rank_variance, window_scores
from asl_kernels.rank_variance import triton as rank_variance_triton
from asl_kernels.window_scores import triton as window_scores_triton
from tests.golden import test_golden as golden

pytestmark = golden.pytestmark


@pytest.fixture(autouse=True)
def _triton_in_place_of_the_references(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[list[str]]:
    """The wrappers' CPU route runs the interpreted kernels; notes each call."""
    calls: list[str] = []

    def through(name: str, module: object) -> object:
        kernel = getattr(module, name)

        def call(*args: object) -> object:
            calls.append(name)
            return kernel(*args)

        return call

    for wrapper, kernels, name in (
        (window_scores.reference, window_scores_triton, "window_scores"),
        (rank_variance.reference, rank_variance_triton, "rank_variance"),
    ):
        monkeypatch.setattr(wrapper, name, through(name, kernels))
    golden.replayed.cache_clear()
    yield calls
    golden.replayed.cache_clear()


@pytest.mark.parametrize("case", golden.CASES)
def test_equals_the_recording(
    case: int, _triton_in_place_of_the_references: list[str]
) -> None:
    golden.test_ranks(case)
    golden.test_ratios(case)
    golden.test_selection(case)
    golden.test_kept_per_head(case)
    assert set(_triton_in_place_of_the_references) == {"window_scores", "rank_variance"}
