"""`Prefill` of models that have layers with a sliding window.

Against a run of the same rule over whole matrices: every layer sees the rows that its
mask by position allows, whatever the chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.prefill import PrefillJob
from asl_vllm.selection import Keep, SelectionError
from asl_vllm.selection.kept import best_and_tail
from asl_vllm_testing.toy import SHAPE, WINDOW, Run, ToyDecoder, job, run

W = 9
"""Of the layers with a sliding window."""
WINDOWS = (W, None, W, None, W)
FULL, SLIDING = (1, 3), (0, 2, 4)
MODEL = dataclasses.replace(SHAPE, windows=WINDOWS, groups=(0, 0, 1, 0, 2))
N, K = job().num_prompt_tokens, job().kept_tokens
DEEPER = K - WINDOW + W
"""Tokens that pass the layers behind the selection layer."""


def windowed(policy: str = "asl", block: int = 1, pruned: int = 24) -> PrefillJob:
    """A prompt whose window blocks, of three groups, begin where the window does."""
    plain = job(policy=policy, pruned=pruned)
    first = N - W  # what the next token's window begins with
    groups = [list(range(5000 + 100 * g, 5000 + 100 * g + W)) for g in range(3)]
    return dataclasses.replace(
        plain, block_size=block, window_blocks=[(first, ids) for ids in groups]
    )


def expected(policy_layer: int | None) -> tuple[dict[int, Tensor], list[list[int]]]:
    """Written key rows and the positions of each layer, by the rule in one piece."""
    toy = ToyDecoder(MODEL)
    work = windowed()
    at = torch.arange(N)
    hidden = toy.embedding[torch.tensor(list(work.prompt_token_ids))]
    written, passed = {}, []
    for layer, window in enumerate(WINDOWS):
        passed.append(at.tolist())
        turn = 1 + 0.01 * at[:, None, None]
        q = turn * toy._project(toy.w_q[layer], hidden, SHAPE.num_heads)
        k = turn * toy._project(toy.w_k[layer], hidden, SHAPE.num_kv_heads)
        v = toy._project(toy.w_v[layer], hidden, SHAPE.num_kv_heads)
        group = SHAPE.num_heads // SHAPE.num_kv_heads
        scale = toy.attention_scale(layer)
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
        seen = at <= at[:, None]
        if window:
            seen &= at > at[:, None] - window
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        heads = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
        hidden = hidden + heads.flatten(1) @ toy.w_o[layer].T
        if window:
            written[layer] = k[-W:-1]
            continue
        if len(at) == K:
            kept = torch.arange(K).expand(SHAPE.num_kv_heads, -1)
        else:
            scores = window_scores(q[-WINDOW:], k, scale=scale, pool_kernel=3)
            kept = best_and_tail(scores, K, WINDOW)
        rows = [k[kept[h], h] for h in range(SHAPE.num_kv_heads)]
        written[layer] = torch.stack(rows, 1)[:-1]
        if layer == policy_layer:
            best = best_and_tail(scores.sum(0)[: N - W], DEEPER, W)
            at, hidden = at[best], hidden[best]
    return written, passed


def written(done: Run, layer: int, slots: Sequence[int]) -> Tensor:
    return torch.stack([done.model.written[layer, slot][0] for slot in slots])


def tokens(decided: Tensor | Keep) -> Tensor:
    return decided if isinstance(decided, Tensor) else torch.arange(0)


@pytest.mark.parametrize("layer", [None, *FULL])
@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_equal_to_the_rule_in_one_piece(layer: int | None, chunk: int) -> None:
    """A ``tau`` of 0 never selects."""
    options = {"tau": 0.0} if layer is None else {"selection_layer": layer}
    work = windowed()
    done = run(work, model=ToyDecoder(MODEL), chunk=chunk, **options)
    rows, passed = expected(layer)
    assert done.report.selection_layer == layer
    for i in FULL:
        got = written(done, i, work.block_ids[0])
        torch.testing.assert_close(got, rows[i], atol=1e-5, rtol=1e-4)
    for i in SLIDING:
        _, ids = work.window_blocks[MODEL.groups[i]]
        got = written(done, i, ids[: W - 1])
        torch.testing.assert_close(got, rows[i], atol=1e-5, rtol=1e-4)
    assert len(done.model.written) == 2 * (K - 1) + 3 * (W - 1)
    for i, positions in enumerate(passed):
        calls = [call.positions for call in done.model.calls if call.layer == i]
        assert [at for chunk in calls for at in chunk] == positions
    assert done.report.computed_token_layers == sum(map(len, passed))
    assert done.report.skipped_token_layers == N * 5 - sum(map(len, passed))


@pytest.mark.parametrize("policy", ["asl", "fastkv", "pyramidinfer", "snapkv"])
def test_chunks_do_not_change_the_result(policy: str) -> None:
    options = {"selection_layer": 1} if policy != "pyramidinfer" else {}
    whole = run(windowed(policy), model=ToyDecoder(MODEL), chunk=100, **options)
    chunks = run(windowed(policy), model=ToyDecoder(MODEL), chunk=7, **options)
    assert whole.report.selection_layer == chunks.report.selection_layer
    for one, other in zip(whole.policy.decisions, chunks.policy.decisions, strict=True):
        assert torch.equal(tokens(one.kept), tokens(other.kept))
        assert torch.equal(tokens(one.deeper), tokens(other.deeper))
    assert whole.model.written.keys() == chunks.model.written.keys()
    for place, (key, _) in whole.model.written.items():
        torch.testing.assert_close(key, chunks.model.written[place][0])
    # Only layers that see all tokens are scored; policies count these.
    assert set(whole.policy.layers) <= {0, 1}


def test_the_adaptive_rule_counts_scored_layers_and_replies_count_all() -> None:
    done = run(windowed(), model=ToyDecoder(MODEL), tau=1e9)
    assert done.policy.layers == [0, 1]
    assert done.report.selection_layer in FULL


def test_nothing_is_selected_where_the_newest_are_all() -> None:
    """k - W tokens beside a window of nearly the prompt: all of them go deeper."""
    wide = dataclasses.replace(MODEL, windows=(N - 2, None) * 2 + (N - 2,))
    work = dataclasses.replace(
        windowed(), window_blocks=[(2, list(range(500, 500 + N)))] * 3
    )
    done = run(work, model=ToyDecoder(wide), selection_layer=1)
    assert done.report.selection_layer is None
    assert done.report.skipped_token_layers == 0


def test_starting_over_is_refused() -> None:
    with pytest.raises(SelectionError, match="starts over with fewer tokens, which"):
        run(windowed("gemfilter"), model=ToyDecoder(MODEL), selection_layer=1)


def test_a_selection_layer_must_see_all_tokens() -> None:
    with pytest.raises(ValueError, match="selection_layer: got 2; allowed: 1, 3, this"):
        run(windowed(), model=ToyDecoder(MODEL), selection_layer=2)
