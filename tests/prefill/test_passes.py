"""`Prefill`: what is kept and written, whatever the chunks, and what it costs."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.prefill import ModelShape, PrefillBuffers
from asl_vllm.prefill.agreement import digest_of
from asl_vllm.prefill.hidden import HostHidden
from asl_vllm.selection.errors import SelectionError
from asl_vllm_testing.launches import waits
from asl_vllm_testing.toy import (
    CAPACITY,
    SHAPE,
    WINDOW,
    ToyDecoder,
    buffers,
    job,
    prefill,
    run,
    same,
)

LAYERS = SHAPE.num_layers
# Fixed selection layers, none at all, and the adaptive rule.
WAYS = [
    {"selection_layer": 0},
    {"selection_layer": 2},
    {"selection_layer": LAYERS - 1},
    {"tau": 0.0},
    {"tau": 0.7},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 43, 1000])
def test_chunks_do_not_change_the_result(chunk: int, way: dict[str, object]) -> None:
    whole = run(job(), chunk=CAPACITY, **way)
    same(run(job(), chunk=chunk, **way), whole)


@pytest.mark.parametrize("step", [0, 20, 100])
def test_load_does_not_change_the_result(step: int) -> None:
    """Chunk borders stay where they are however little a step may spend."""
    at_once = run(job(), chunk=16, selection_layer=2)
    bit_by_bit = run(job(), step, chunk=16, selection_layer=2)
    same(bit_by_bit, at_once)
    assert bit_by_bit.model.calls == at_once.model.calls


def test_padding_after_a_chunk_is_not_taken() -> None:
    same(run(job(), model=ToyDecoder(padding=5)), run(job()))


def test_the_adaptive_rule_selects_in_these_tests() -> None:
    """Keeps the cases above from being all of one kind."""
    assert run(job(), tau=0.0).report.selection_layer is None
    assert run(job(), tau=0.7).report.selection_layer not in (None, LAYERS - 1)


def test_the_pool_holds_each_heads_kept_rows() -> None:
    work = job()
    done = run(work, selection_layer=2)
    for layer in range(3):
        kept = done.policy.decisions[layer].kept
        for row, slot in enumerate(work.block_ids[0]):
            key, value = done.model.written[layer, slot]
            for head in range(SHAPE.num_kv_heads):
                token = int(kept[head, row])
                assert torch.equal(key[head], done.model.keys[layer][token][head])
                assert torch.equal(value[head], done.model.values[layer][token][head])


def test_deeper_layers_keep_all_they_are_given() -> None:
    work = job()
    done = run(work, selection_layer=2)
    for layer in range(3, LAYERS):
        assert len(done.model.keys[layer]) == work.kept_tokens
        for row, slot in enumerate(work.block_ids[0]):
            key, value = done.model.written[layer, slot]
            assert torch.equal(key, done.model.keys[layer][row])
            assert torch.equal(value, done.model.values[layer][row])


def test_deeper_layers_see_the_selected_tokens_at_their_positions() -> None:
    work = job()
    done = run(work, selection_layer=2, chunk=7)
    deeper = done.policy.decisions[-1].deeper
    assert isinstance(deeper, torch.Tensor)
    everyone = list(range(work.num_prompt_tokens))
    for layer in range(LAYERS):
        calls = [call for call in done.model.calls if call.layer == layer]
        positions = [p for call in calls for p in call.positions]
        assert positions == (everyone if layer <= 2 else deeper.tolist())
        starts = [call.start for call in calls]
        assert starts == list(range(0, len(positions), 7))
    assert deeper.tolist()[-WINDOW:] == everyone[-WINDOW:]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_only_the_last_layers_output_is_not_needed(way: dict[str, object]) -> None:
    """`ToyDecoder` makes it NaN, which no later score would survive."""
    for call in run(job(), **way).model.calls:
        assert call.keys_only == (call.layer == LAYERS - 1)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_slots_are_written_once_a_layer_and_the_last_row_never(
    way: dict[str, object],
) -> None:
    """`ToyDecoder` asserts that no slot is written twice."""
    work = job()
    done = run(work, **way)
    assert len(work.block_ids[0]) == work.kept_tokens - 1
    assert done.model.written.keys() == {
        (layer, slot) for layer in range(LAYERS) for slot in work.block_ids[0]
    }


def test_scores_come_from_the_window_and_the_layers_own_keys() -> None:
    done = run(job(), tau=0.0, chunk=3)
    for layer, seen in enumerate(done.policy.layer_scores):
        want = window_scores(
            done.model.queries[layer][-WINDOW:],
            done.model.keys[layer],
            scale=done.model.attention_scale(layer),
            pool_kernel=3,
        )
        assert torch.equal(seen, want.sum(0))


def test_the_layer_score_is_the_sum_over_ranks() -> None:
    class Ranks(ToyDecoder):
        def sum_over_ranks(self, layer_score: torch.Tensor) -> torch.Tensor:
            return layer_score.flip(0)

    alone, ranks = run(job(), tau=0.0), run(job(), model=Ranks(), tau=0.0)
    # Layer 0 has no history: the same input, summed otherwise.
    assert torch.equal(
        ranks.policy.layer_scores[0], alone.policy.layer_scores[0].flip(0)
    )


@pytest.mark.parametrize("layer", range(LAYERS))
def test_selection_saves_the_deeper_layers_tokens(layer: int) -> None:
    work = job()
    report = run(work, selection_layer=layer).report
    n, k = work.num_prompt_tokens, work.kept_tokens
    assert report.selection_layer == layer
    assert report.computed_token_layers == n * (layer + 1) + k * (LAYERS - layer - 1)
    assert report.computed_token_layers + report.skipped_token_layers == n * LAYERS


def test_snapkv_computes_every_token_in_every_layer() -> None:
    work = job(policy="snapkv")
    report = run(work).report
    assert report.selection_layer is None
    assert report.skipped_token_layers == 0
    assert report.computed_token_layers == work.num_prompt_tokens * LAYERS


def test_a_report_names_what_was_pruned() -> None:
    work = job(n=60, pruned=36)
    assert (work.kept_tokens, work.pruned_tokens) == (24, 36)
    report = run(work).report
    assert report.pruned_bands == 1
    assert report.seconds > 0


def test_nothing_to_spend_still_runs_one_pass() -> None:
    begun, model, _ = prefill(job(), chunk=16)
    assert begun.advance(0) == 16
    assert begun.advance(-5) == 16
    assert [(call.layer, call.start) for call in model.calls] == [(0, 0), (0, 16)]


@pytest.mark.parametrize("chunk", [1, 16, 100])
@pytest.mark.parametrize("step", [1, 16, 17, 150])
def test_a_step_runs_the_passes_that_fit(step: int, chunk: int) -> None:
    begun, _, _ = prefill(job(), chunk=chunk, selection_layer=2)
    while not begun.done:
        first = begun.next_cost
        assert 0 < first <= chunk
        spent = begun.advance(step)
        assert spent <= max(step, first)
        assert begun.done or spent + begun.next_cost > step


def test_done_after_the_last_layer() -> None:
    begun, _, _ = prefill(job(n=30, pruned=8), chunk=100)
    for layer in range(LAYERS):
        assert (begun.progress.layer, begun.done) == (layer, False)
        begun.advance(1)
    assert (begun.progress.layer, begun.done) == (LAYERS, True)
    assert begun.advance(100) == 0


def test_tokens_are_embedded_in_chunks() -> None:
    assert run(job(), chunk=16).model.embedded == [16, 16, 12]


def test_buffers_are_lent_to_one_prompt_after_another() -> None:
    """What a longer prompt left behind is not seen."""
    lent = buffers()
    run(job(n=70, pruned=20), lent=lent)
    same(run(job(), lent=lent, selection_layer=2), run(job(), selection_layer=2))


def test_a_prompt_longer_than_the_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"61 tokens.*60 tokens.*max_prefill_tokens"):
        prefill(job(n=61), lent=buffers(60))
    prefill(job(n=60), lent=buffers(60))


@pytest.mark.parametrize("layer", [0, 3])
def test_scores_that_are_not_finite_fail(layer: int) -> None:
    begun, _, _ = prefill(job(), model=ToyDecoder(poison={layer}), tau=0.0)
    with pytest.raises(SelectionError, match=f"layer {layer}"):
        begun.advance(10**9)


def test_ranks_that_decide_otherwise_fail() -> None:
    """Each layer that is decided about is compared, whether it selects or not."""
    selected = run(job(), selection_layer=2).policy.decisions[2].deeper
    assert isinstance(selected, Tensor)
    digests = [b"", b"", digest_of(selected)]
    model = ToyDecoder(other_rank=digests)
    run(job(), model=model, selection_layer=2)
    # One exchange a layer that is scored, none for the two after it.
    assert model.digests == digests
    others = selected.clone()
    others[0] += 1
    for layer, said in ((2, digest_of(others)), (1, digests[2]), (2, b"")):
        other = [said if i == layer else value for i, value in enumerate(digests)]
        begun, _, _ = prefill(
            job(), model=ToyDecoder(other_rank=other), selection_layer=2
        )
        with pytest.raises(SelectionError, match=f"layer {layer}: tensor-parallel"):
            begun.advance(10**9)


@pytest.mark.parametrize(
    ("one", "other"), [([0, 4], [2, 3]), ([1, 2], [2, 1]), ([0], [0, 0])]
)
def test_other_tokens_have_another_digest(one: list[int], other: list[int]) -> None:
    assert digest_of(torch.tensor(one)) != digest_of(torch.tensor(other))
    assert digest_of(torch.tensor(one)) == digest_of(torch.tensor(one))


READS = {
    # Of five layers: those from l_min on to the selection, and at the end none is
    # left to look at.
    ("asl", "selected", 1): {"l_min": 1, "tau": 2.0},
    ("asl", "not selected", 4): {"l_min": 1, "tau": 0.0},
    ("asl", "fixed", 1): {"selection_layer": 2},
    ("asl", "fixed at the end", 1): {"selection_layer": 4},
    ("snapkv", "", 1): {},
}


@pytest.mark.parametrize(
    ("policy", "reads", "options"),
    [(policy, reads, options) for (policy, _, reads), options in READS.items()],
    ids=["-".join(filter(None, key[:2])) for key in READS],
)
def test_the_host_waits_only_where_something_can_be_selected(
    policy: str,
    reads: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, _, _ = prefill(job(policy=policy), **options)
    for name in ("run_layer", "write_kept"):  # those of the toy are its own
        monkeypatch.setattr(ToyDecoder, name, lambda *_: None)
    with waits() as found:
        begun.advance(10**9)
    assert begun.done
    assert found == ["tolist"] * reads


def test_buffers_hold_what_the_shape_says() -> None:
    held = PrefillBuffers(SHAPE, 100, 8)
    window = 8 * SHAPE.num_heads * SHAPE.head_dim * SHAPE.dtype.itemsize
    assert held.device_bytes == 100 * SHAPE.bytes_per_token() + window
    assert held.host_bytes == 0


def test_hidden_states_on_the_host_leave_the_device_one_chunk_of_them() -> None:
    device = PrefillBuffers(SHAPE, 100, 8)
    host = PrefillBuffers(SHAPE, 100, 8, host_chunk=16)
    row = SHAPE.hidden_size * SHAPE.dtype.itemsize
    assert host.host_bytes == 100 * row
    assert device.device_bytes - host.device_bytes == (100 - 16) * row


def _bytes_reported_and_taken(host_chunk: int | None) -> tuple[int, int]:
    # Each above 32 MiB, so that malloc maps it and takes no page that lay free.
    shape = dataclasses.replace(SHAPE, hidden_size=1100, head_dim=550, value_dim=550)
    memory = psutil.Process().memory_full_info
    before = memory().uss
    held = PrefillBuffers(shape, 8192, 8, host_chunk=host_chunk)
    return held.device_bytes + held.host_bytes, memory().uss - before


@pytest.mark.parametrize("host_chunk", [None, 64])
def test_the_bytes_reported_are_the_bytes_taken(host_chunk: int | None) -> None:
    """By what a fresh process holds in memory: another may have pages to reuse."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        reported, taken = pool.submit(_bytes_reported_and_taken, host_chunk).result()
    assert taken == pytest.approx(reported, rel=0.02)


def test_an_8b_model_takes_12_kib_a_token_beside_its_scratch_pages() -> None:
    shape = ModelShape(32, 4096, 32, 8, 128, 128, torch.bfloat16, torch.device("meta"))
    assert shape.bytes_per_token() == 12 * 1024
    window = 32 * 32 * 128 * 2
    held = PrefillBuffers(shape, 1 << 17, 32)
    assert held.device_bytes == (1 << 17) * 12 * 1024 + window


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_hidden_states_on_the_host_do_not_change_the_result(
    chunk: int, way: dict[str, object]
) -> None:
    lent = PrefillBuffers(SHAPE, CAPACITY, WINDOW, host_chunk=chunk)
    same(run(job(), lent=lent, chunk=chunk, **way), run(job(), chunk=chunk, **way))


@pytest.mark.parametrize("step", [1, 3, 8, 100])
def test_rows_on_the_host_are_kept_in_their_order(step: int) -> None:
    hidden = HostHidden(SHAPE, 20, step)
    rows = torch.arange(20.0)[:, None].expand(-1, SHAPE.hidden_size)
    for start in range(0, 20, step):
        hidden.store(start, rows[start : start + step])
    kept = torch.tensor([0, 1, 5, 6, 7, 11, 18, 19])
    hidden.keep(kept, 20)
    for start in range(0, len(kept), step):
        end = min(start + step, len(kept))
        assert hidden.load(start, end)[:, 0].tolist() == kept[start:end].tolist()
