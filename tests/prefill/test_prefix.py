"""A prefill over a cached prefix keeps and writes what one from scratch does.

The donor of the prefix is another prompt, with another question, unpruned. The toy's
rounding does not depend on how a prompt is cut up, so all must be equal to the bit.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from asl_vllm.prefill import PrefillBuffers, PrefillJob
from asl_vllm.prefill.hidden import HostHidden
from asl_vllm_testing.donated import donated
from asl_vllm_testing.toy import (
    CAPACITY,
    SHAPE,
    WINDOW,
    Run,
    ToyDecoder,
    job,
    prefill,
    run,
    same,
)

WAYS = [
    {"policy": "asl", "selection_layer": 1, "propagated_share": 0.4},
    {"policy": "asl", "selection_layer": 2},
    {"policy": "asl", "selection_layer": SHAPE.num_layers - 1},
    {"policy": "asl", "tau": 0.7},
    {"policy": "snapkv"},
    {"policy": "fastkv", "selection_layer": 2, "propagated_share": 0.6},
    {"policy": "gemfilter", "selection_layer": 1},
    {"policy": "pyramidinfer"},
]


def _over_prefix(work: PrefillJob, hit: int, seed: int = 7, **options: object) -> Run:
    model = ToyDecoder()
    if hit:
        tokens = list(work.prompt_token_ids)[:hit]
        model.pool = donated(tokens, seed)
        rows = [list(range(hit))[::-1]] * work.bands
        work = dataclasses.replace(work, reused_block_ids=rows)
    return run(work, model=model, **options)


def _work(way: dict[str, object], n: int, kept: int = 16) -> PrefillJob:
    return job(n=n, pruned=n - kept, policy=str(way["policy"]))


def _settings(way: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in way.items() if name != "policy"}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_equal_to_scratch_to_the_bit(way: dict[str, object], chunk: int) -> None:
    random = torch.Generator().manual_seed(chunk)
    for n in (23, 44) if chunk == 1 else (23, 44, 71):
        work = _work(way, n)
        scratch = run(work, chunk=chunk, **_settings(way))
        some = torch.randint(1, n - WINDOW, (2,), generator=random).tolist()
        for hit in (0, *some, n - WINDOW):
            reused = _over_prefix(work, hit, n + hit, chunk=chunk, **_settings(way))
            same(reused, scratch)
            assert reused.report.skipped_token_layers == (
                scratch.report.skipped_token_layers
            )


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("step", [0, 20, 100])
def test_load_does_not_change_the_result(way: dict[str, object], step: int) -> None:
    work = _work(way, 44)
    same(
        _over_prefix(work, 30, step=step, **_settings(way)),
        run(work, **_settings(way)),
    )


def test_hidden_states_in_host_memory() -> None:
    lent = PrefillBuffers(SHAPE, CAPACITY, WINDOW, host_chunk=16)
    assert isinstance(lent.hidden, HostHidden)
    work = _work(WAYS[0], 71)
    reused = _over_prefix(work, 60, lent=lent, **_settings(WAYS[0]))
    same(reused, run(work, **_settings(WAYS[0])))


def test_only_what_the_prefix_lacks_is_computed() -> None:
    """Behind the hit everything; of the hit what was selected, layer by layer."""
    n, hit, layer, kept = 44, 30, 2, 16
    done = _over_prefix(_work(WAYS[1], n), hit, **_settings(WAYS[1]))
    deeper = done.policy.decisions[layer].deeper
    assert isinstance(deeper, Tensor)
    again = int((deeper < hit).sum())
    assert 0 < again < kept
    report = done.report
    assert report.reused_tokens == hit
    assert report.reused_token_layers == hit * (layer + 1)
    assert report.rerun_token_layers == again * (layer + 1)
    rest = kept * (SHAPE.num_layers - layer - 1)
    assert report.computed_token_layers == (
        (n - hit) * (layer + 1) + report.rerun_token_layers + rest
    )
    assert sum(done.model.embedded) == n - hit + again


def test_a_rerun_is_cut_into_passes_and_counted() -> None:
    """No pass takes more than a chunk, so other requests wait no longer than usual."""
    chunk, hit = 5, 38
    work = _work(WAYS[1], 44)
    model = ToyDecoder(pool=donated(list(work.prompt_token_ids)[:hit], 1))
    work = dataclasses.replace(work, reused_block_ids=[list(range(hit))[::-1]])
    begun, *_ = prefill(work, model=model, chunk=chunk, **_settings(WAYS[1]))
    while not begun.done:
        cost = begun.next_cost
        assert 0 < cost <= chunk
        assert begun.advance(0) == cost
    assert begun.report().rerun_token_layers > 0


def test_a_prefix_may_not_reach_into_the_window() -> None:
    work = _work(WAYS[4], 44)
    with pytest.raises(AssertionError, match="no window is computed"):
        _over_prefix(work, 44 - WINDOW + 1)


@pytest.mark.parametrize("keep_shallow", [False, True])
@pytest.mark.parametrize("hit", [1, 17, 40])
def test_bands(hit: int, keep_shallow: bool) -> None:
    """Five bands of one layer; each reads its own blocks."""
    work = _work(WAYS[1], 44)
    slots = [1000 * band + i for band in range(5) for i in range(44)]
    first = 0 if keep_shallow else work.pruned_blocks
    rows = [slots[44 * band : 44 * band + 44 - first] for band in range(5)]
    work = dataclasses.replace(work, block_ids=rows, keep_shallow=keep_shallow)
    same(
        _over_prefix(work, hit, **_settings(WAYS[1])),
        run(work, **_settings(WAYS[1])),
    )
