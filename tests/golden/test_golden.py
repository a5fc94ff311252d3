"""The rule against recordings of the authors' published implementation."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asl_vllm.config import AslConfig
from asl_vllm.selection import ReplayResult, replay

GOLDEN = (Path(__file__).resolve().parents[2] / "../shared/golden").resolve()
CASES = range(4)

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recordings (../shared/golden) are not here"
)


@functools.cache
def recording(case: int) -> dict[str, Any]:
    with np.load(GOLDEN / f"case{case}.npz") as arrays:
        recorded: dict[str, Any] = dict(arrays)
    recorded["config"] = json.loads(str(recorded["config"]))
    return recorded


def config_of(case: int) -> AslConfig:
    recorded = recording(case)["config"]
    return AslConfig(
        policy="asl",
        window=recorded["window"],
        pool_kernel=recorded["kernel"],
        l_min=recorded["l_min"],
        l_obs=recorded["l_obs"],
        tau=recorded["tau"],
    )


@functools.cache
def replayed(case: int, policy: str = "asl", fixed: int | None = None) -> ReplayResult:
    recorded = recording(case)
    return replay(
        torch.from_numpy(recorded["q"]),
        torch.from_numpy(recorded["k"]),
        dataclasses.replace(config_of(case), policy=policy, selection_layer=fixed),
        budget=recorded["config"]["budget"],
        num_layers=recorded["config"]["layers"],
    )


@pytest.mark.parametrize("case", CASES)
def test_ranks(case: int) -> None:
    # The recordings have rows from layer 0 on, without the selection layer's.
    want = recording(case)["ranks"]
    got = replayed(case).ranks.numpy()
    assert len(got) >= len(want)
    np.testing.assert_array_equal(got[: len(want)], want)


@pytest.mark.parametrize("case", CASES)
def test_ratios(case: int) -> None:
    np.testing.assert_allclose(
        replayed(case).ratios, recording(case)["ratios"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("case", CASES)
def test_selection(case: int) -> None:
    layer = int(recording(case)["selected_layer"])
    result = replayed(case)
    if layer == -1:
        assert result.selection_layer is None
        assert result.deeper is None
        assert len(result.kept) == len(recording(case)["q"])
    else:
        assert result.selection_layer == layer
        assert result.deeper is not None
        want = recording(case)["selected"]
        np.testing.assert_array_equal(result.deeper.numpy(), want)


@pytest.mark.parametrize("case", CASES)
def test_kept_per_head(case: int) -> None:
    want = recording(case)["kept"]
    assert len(replayed(case).kept) == len(want)
    for layer, kept in enumerate(replayed(case).kept):
        np.testing.assert_array_equal(kept.numpy(), want[layer], err_msg=f"{layer=}")


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
