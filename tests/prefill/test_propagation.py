"""`Prefill` under policies that send on more than they keep, or start over."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.prefill import Prefill
from asl_vllm.selection.policies import Keep, LayerDecision, Policy
from asl_vllm_testing.toy import (
    CAPACITY,
    SHAPE,
    WINDOW,
    Run,
    ToyDecoder,
    buffers,
    config,
    job,
    prefill,
    run,
    same,
)

LAYERS = SHAPE.num_layers
N, K = job().num_prompt_tokens, job().kept_tokens
WAYS = [
    ("fastkv", {"propagated_share": 0.7}),
    ("fastkv", {}),  # a fifth of the prompt is less than the budget
    ("fastkv", {"selection_layer": 0, "propagated_share": 1.0}),
    ("gemfilter", {"selection_layer": 0}),
    ("gemfilter", {}),
    ("gemfilter", {"selection_layer": LAYERS - 1}),
    ("pyramidinfer", {}),
    ("pyramidinfer", {"decay_ratio": 0.3}),  # down to k tokens before the last layer
]


def rows_of_layers(done: Run) -> list[list[int]]:
    """The positions that went through each layer, in the order of the layers run."""
    runs: list[list[int]] = []
    for call in done.model.calls:
        if call.start == 0:
            runs.append([])
        runs[-1].extend(call.positions)
    return runs


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 43])
def test_chunks_do_not_change_the_result(
    name: str, options: dict[str, object], chunk: int
) -> None:
    whole = run(job(policy=name), chunk=CAPACITY, **options)
    same(run(job(policy=name), chunk=chunk, **options), whole)


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_load_does_not_change_the_result(name: str, options: dict[str, object]) -> None:
    at_once = run(job(policy=name), **options)
    bit_by_bit = run(job(policy=name), 20, **options)
    same(bit_by_bit, at_once)
    assert bit_by_bit.model.calls == at_once.model.calls


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_every_layer_writes_its_slots_once(
    name: str, options: dict[str, object]
) -> None:
    """`ToyDecoder` asserts that no slot is written twice."""
    work = job(policy=name)
    done = run(work, **options)
    assert done.model.written.keys() == {
        (layer, slot) for layer in range(LAYERS) for slot in work.block_ids[0]
    }


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_the_pool_holds_what_each_layer_keeps(
    name: str, options: dict[str, object]
) -> None:
    work = job(policy=name)
    done = run(work, **options)
    decided = dict(zip(done.policy.layers, done.policy.decisions, strict=True))
    for layer in range(LAYERS):
        decision = decided.get(layer)
        kept = Keep.ALL if decision is None else decision.kept
        if not isinstance(kept, Tensor):  # the layer was given k tokens
            assert len(done.model.keys[layer]) == K
            kept = torch.arange(K).expand(SHAPE.num_kv_heads, -1)
        for row, slot in enumerate(work.block_ids[0]):
            key, value = done.model.written[layer, slot]
            for head, token in enumerate(kept[:, row].tolist()):
                assert torch.equal(key[head], done.model.keys[layer][token][head])
                assert torch.equal(value[head], done.model.values[layer][token][head])


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_what_goes_deeper_ends_with_the_prompt(
    name: str, options: dict[str, object]
) -> None:
    """Ascending original positions, never fewer than k, the last token always there."""
    done = run(job(policy=name), **options)
    for positions in rows_of_layers(done):
        assert positions == sorted(set(positions))
        assert positions[-1] == N - 1
        assert len(positions) >= K


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_the_cost_is_what_was_run(name: str, options: dict[str, object]) -> None:
    done = run(job(policy=name), **options)
    cost = sum(map(len, rows_of_layers(done)))
    assert done.report.computed_token_layers == cost
    assert done.report.skipped_token_layers == max(0, N * LAYERS - cost)


# FastKV: more tokens go deeper than are kept


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 2])
def test_a_share_of_the_prompt_goes_deeper(layer: int) -> None:
    options = {"selection_layer": layer, "propagated_share": 0.7}
    done = run(job(policy="fastkv"), **options)
    share = int(0.7 * N)
    assert K < share < N
    rows = rows_of_layers(done)
    assert list(map(len, rows)) == [N] * (layer + 1) + [share] * (LAYERS - layer - 1)
    deeper = done.policy.decisions[layer].deeper
    assert isinstance(deeper, Tensor)
    assert all(positions == deeper.tolist() for positions in rows[layer + 1 :])
    assert done.report.selection_layer == layer
    assert done.policy.layers == list(range(LAYERS))


def test_deeper_layers_keep_by_their_own_scores() -> None:
    done = run(job(policy="fastkv"), selection_layer=1, propagated_share=0.7, chunk=7)
    for layer, seen in enumerate(done.policy.layer_scores):
        want = window_scores(
            done.model.queries[layer][-WINDOW:],
            done.model.keys[layer],
            scale=done.model.attention_scale(layer),
            pool_kernel=3,
        )
        assert torch.equal(seen, want.sum(0))
        assert seen.shape == ((N if layer <= 1 else int(0.7 * N)) - WINDOW,)


def test_the_budget_is_the_least_that_goes_deeper() -> None:
    """Then deeper layers have no choice, and are not scored."""
    done = run(job(policy="fastkv"), selection_layer=2)
    assert list(map(len, rows_of_layers(done))) == [N] * 3 + [K] * (LAYERS - 3)
    assert done.policy.asked == [0, 1, 2]


def test_the_whole_prompt_may_go_deeper() -> None:
    done = run(job(policy="fastkv"), selection_layer=2, propagated_share=1.0)
    same_as = run(job(policy="snapkv"))
    assert done.report.selection_layer is None
    assert done.report.skipped_token_layers == 0
    assert done.model.written.keys() == same_as.model.written.keys()
    for place, (key, _) in done.model.written.items():
        assert torch.equal(key, same_as.model.written[place][0])


# GemFilter: the selected tokens are a prompt of their own


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("chunk", [7, CAPACITY])
def test_the_selected_tokens_run_again_from_layer_0(layer: int, chunk: int) -> None:
    done = run(job(policy="gemfilter"), selection_layer=layer, chunk=chunk)
    filtering, again = [list(range(N))], [list(range(N - K, N))]
    assert rows_of_layers(done) == filtering * (layer + 1) + again * LAYERS
    assert done.policy.asked == list(range(layer + 1))
    assert done.policy.layers == [layer]
    assert done.report.selection_layer == layer
    assert sum(done.model.embedded) == N + K
    cost = N * (layer + 1) + K * LAYERS
    assert done.report.computed_token_layers == cost
    assert done.report.skipped_token_layers == max(0, N * LAYERS - cost)


def test_the_second_run_knows_only_the_selected_tokens() -> None:
    """It equals a prompt of these tokens alone, at the last positions."""
    work = job(policy="gemfilter")
    done = run(work, selection_layer=2)
    selected = done.policy.decisions[0].deeper
    assert isinstance(selected, Tensor)
    alone = ToyDecoder()
    hidden = alone.embed(torch.tensor(work.prompt_token_ids)[selected], selected)
    tap = prefill(work)[0]._tap
    tap.start_layer(K)
    tap.start_chunk(0, K)
    for layer in range(LAYERS):
        alone.run_layer(layer, torch.arange(N - K, N), hidden, 0, tap)
        assert torch.equal(alone.keys[layer], done.model.keys[layer])
        for row, slot in enumerate(work.block_ids[0]):
            key, value = done.model.written[layer, slot]
            assert torch.equal(key, alone.keys[layer][row])
            assert torch.equal(value, alone.values[layer][row])


def test_the_filter_sees_the_sum_over_ranks() -> None:
    class Ranks(ToyDecoder):
        def sum_over_ranks(self, layer_score: Tensor) -> Tensor:
            return layer_score.flip(0)

    work = job(policy="gemfilter")
    alone, ranks = run(work), run(work, model=Ranks())
    assert torch.equal(
        ranks.policy.layer_scores[0], alone.policy.layer_scores[0].flip(0)
    )


def test_a_policy_that_forgets_to_restart_is_found_out() -> None:
    class Forgetful(Policy):
        def score(self, *_: object) -> None:
            return None

        def decide(self, *_: object) -> LayerDecision:
            raise AssertionError("asked about a layer without scores")

    policy = Forgetful(config(), num_layers=LAYERS, kept_tokens=K)
    begun = Prefill(job(), ToyDecoder(), policy, buffers(), chunk_tokens=16)
    with pytest.raises(AssertionError):
        begun.advance(10**9)
    assert begun.progress.layer == LAYERS


# PyramidInfer: fewer tokens at each layer


@pytest.mark.parametrize("decay", [0.9, 0.6, 0.3])
def test_fewer_tokens_go_through_each_layer(decay: float) -> None:
    done = run(job(policy="pyramidinfer"), decay_ratio=decay)
    context, want = N - WINDOW, []
    for layer in range(LAYERS):
        want.append(context + WINDOW)
        cosine = (math.cos(math.pi * layer / LAYERS) + 1) / 2
        context = max(K - WINDOW, int(context * ((1 - decay) * cosine + decay)))
    assert list(map(len, rows_of_layers(done))) == want
    assert want[1] == N
    assert want[2] < N
    assert done.report.selection_layer == 1
    for earlier, later in itertools.pairwise(rows_of_layers(done)):
        assert set(later) <= set(earlier)


def test_one_choice_for_all_heads_with_sinks_and_window() -> None:
    done = run(job(policy="pyramidinfer"))
    rows = rows_of_layers(done)
    for layer, decision in zip(done.policy.layers, done.policy.decisions, strict=True):
        assert isinstance(decision.kept, Tensor)
        for tokens in decision.kept.tolist():
            assert tokens == decision.kept[0].tolist()
            positions = [rows[layer][token] for token in tokens]
            assert positions[:4] == [0, 1, 2, 3]
            assert positions[-WINDOW:] == list(range(N - WINDOW, N))


def test_no_more_is_asked_once_k_tokens_are_left() -> None:
    done = run(job(policy="pyramidinfer"), decay_ratio=0.01)
    sizes = list(map(len, rows_of_layers(done)))
    assert sizes[-1] == K
    assert done.policy.asked == list(range(sizes.index(K)))
