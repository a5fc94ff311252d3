"""The rule against recordings of the authors' published implementation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from asl_vllm_testing.golden import CASES, recording
from asl_vllm_testing.golden.checks import CHECKS, replayed


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_recording(case: int, check: Callable[[int], None]) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES)
def test_snapkv_keeps_the_same_tokens_and_never_selects(case: int) -> None:
    result = replayed(case, policy="snapkv")
    assert result.selection_layer is None
    assert result.ratios == ()
    want = recording(case)["kept"]
    np.testing.assert_array_equal(torch.stack(result.kept).numpy(), want)


@pytest.mark.parametrize("case", [0, 1, 3])
def test_fixing_the_layer_that_was_found_selects_the_same(case: int) -> None:
    layer = int(recording(case)["selected_layer"])
    result = replayed(case, fixed=layer)
    assert result.selection_layer == layer
    assert result.ratios == ()
    assert result.deeper is not None
    want = recording(case)["selected"]
    np.testing.assert_array_equal(result.deeper.numpy(), want)
