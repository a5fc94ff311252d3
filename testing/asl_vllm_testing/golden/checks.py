"""Our rule on the recordings' queries and keys, and what must be equal then."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from asl_vllm.config import AslConfig
from asl_vllm.selection import ReplayResult, replay
from asl_vllm_testing.golden import recording


def config_of(case: int) -> AslConfig:
    """The settings of a case as ours."""
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
    """What ours makes of a case; ``fixed`` is a selection layer given beforehand."""
    recorded = recording(case)
    return replay(
        torch.from_numpy(recorded["q"]),
        torch.from_numpy(recorded["k"]),
        dataclasses.replace(config_of(case), policy=policy, selection_layer=fixed),
        budget=recorded["config"]["budget"],
        num_layers=recorded["config"]["layers"],
    )


def ranks_are_equal(case: int) -> None:
    """Row by row: the recordings have layers from 0 on, without the selection's."""
    want = recording(case)["ranks"]
    got = replayed(case).ranks.numpy()
    assert len(got) >= len(want)
    np.testing.assert_array_equal(got[: len(want)], want)


def ratios_are_equal(case: int) -> None:
    """The ratios of variances, to rounding."""
    np.testing.assert_allclose(
        replayed(case).ratios, recording(case)["ratios"], rtol=1e-5, atol=0
    )


def selection_is_equal(case: int) -> None:
    """The layer and its tokens, or that there is none."""
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


def kept_tokens_are_equal(case: int) -> None:
    """Those of each head of each layer."""
    want = recording(case)["kept"]
    assert len(replayed(case).kept) == len(want)
    for layer, kept in enumerate(replayed(case).kept):
        np.testing.assert_array_equal(kept.numpy(), want[layer], err_msg=f"{layer=}")


CHECKS = (
    ranks_are_equal,
    ratios_are_equal,
    selection_is_equal,
    kept_tokens_are_equal,
)
