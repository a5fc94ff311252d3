"""Bands of layers, and prefills that keep every token in the shallow ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from asl_vllm.prefill import Bands, Prefill
from asl_vllm.selection.policies import make_policy
from asl_vllm_testing.toy import (
    SHAPE,
    RecordingPolicy,
    Run,
    ToyDecoder,
    buffers,
    config,
    job,
)

LAYERS = 6
CHUNK = 16


def test_bands_are_runs_of_equal_size() -> None:
    bands = Bands(6, 3)
    assert [bands.of(layer) for layer in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [bands.ends(layer) for layer in range(6)] == [False, True] * 3
    assert [bands.below(layer) for layer in range(6)] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_every_layer_is_in_a_band(count: int) -> None:
    bands = Bands(10, count)
    members = [bands.of(layer) for layer in range(10)]
    assert members == sorted(members)
    assert {members.count(band) for band in range(count)} == {10 // count}
    assert sum(bands.ends(layer) for layer in range(10)) == count


@pytest.mark.parametrize("count", [0, 3, 11])
def test_other_numbers_of_bands_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} for 10 layers; allowed: 1, 2, "):
        Bands(10, count)


def run(selection_layer: int | None, bands: int, *, full: bool) -> Run:
    """A prompt of 44 tokens of which 20 are kept, through 6 layers."""
    work = job(n=44, pruned=24)
    held = 43 if full else 19
    work = dataclasses.replace(
        work,
        block_ids=[[b * 1000 + 3 * i for i in range(held)] for b in range(bands)],
        keep_shallow=full,
    )
    way = {"tau": 0.0} if selection_layer is None else {}
    settings = config(selection_layer=selection_layer, **way)
    model = ToyDecoder(shape=dataclasses.replace(SHAPE, num_layers=LAYERS))
    policy = RecordingPolicy(
        make_policy("asl", settings, num_layers=LAYERS, kept_tokens=work.kept_tokens)
    )
    begun = Prefill(work, model, policy, buffers(), chunk_tokens=CHUNK)
    while not begun.done:
        begun.advance(100)
    return Run(model, policy, begun.report())


@pytest.mark.parametrize("bands", [1, 2, 3, 6])
@pytest.mark.parametrize("selection_layer", [*range(LAYERS), None])
def test_shallow_bands_keep_every_token_and_deep_ones_the_selected(
    selection_layer: int | None, bands: int
) -> None:
    done = run(selection_layer, bands, full=True)
    split = Bands(LAYERS, bands)
    deep = 0 if selection_layer is None else split.below(selection_layer)
    for layer in range(LAYERS):
        band = split.of(layer)
        keys, values = done.model.keys[layer], done.model.values[layer]
        num_tokens = 20 if band >= bands - deep else 44
        assert len(keys) == num_tokens
        # The last is the engine's own; the others end where the slots end.
        slots = [band * 1000 + 3 * i for i in range(43)][-(num_tokens - 1) :]
        for row, slot in enumerate(slots):
            key, value = done.model.written[layer, slot]
            assert torch.equal(key, keys[row])
            assert torch.equal(value, values[row])
        written = {slot for where, slot in done.model.written if where == layer}
        assert written == set(slots)
    report = done.report
    assert report.selection_layer == selection_layer
    assert report.pruned_bands == deep
    assert report.skipped_token_layers == 24 * deep * (LAYERS // bands)


@pytest.mark.parametrize("selection_layer", range(LAYERS))
def test_the_tokens_are_those_of_the_selection_layer(selection_layer: int) -> None:
    """Although they go deeper at the end of its band only."""
    plain = run(selection_layer, 1, full=False)
    full = run(selection_layer, 2, full=True)
    mine, theirs = (r.policy.decisions[-1].deeper for r in (full, plain))
    assert isinstance(mine, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    assert torch.equal(mine, theirs)
    deepest = [call for call in full.model.calls if call.layer == LAYERS - 1]
    seen = [position for call in deepest for position in call.positions]
    shallow = Bands(LAYERS, 2).below(selection_layer) == 0
    assert seen == (list(range(44)) if shallow else mine.tolist())


@pytest.mark.parametrize("selection_layer", [0, 3, None])
def test_bands_alone_change_nothing_but_the_slots(selection_layer: int | None) -> None:
    whole, split = (run(selection_layer, bands, full=False) for bands in (1, 3))
    assert whole.report.pruned_bands == 1
    assert split.report.pruned_bands == 3
    for (layer, slot), (key, value) in whole.model.written.items():
        mine = split.model.written[layer, layer // 2 * 1000 + slot]
        assert torch.equal(mine[0], key)
        assert torch.equal(mine[1], value)
    assert len(whole.model.written) == len(split.model.written)
