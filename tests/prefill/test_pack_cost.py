"""What short prompts cost that pass together, and which ones do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from asl_kernels.window_scores import window_scores
from asl_vllm.prefill import (
    Packer,
    PrefillJob,
    most_packed,
)
from asl_vllm.selection import together
from asl_vllm.selection.policies import base
from asl_vllm_testing.launches import Launches
from asl_vllm_testing.packs import (
    CHUNK,
    LAYERS,
    MIXED,
    drain,
    jobs,
    made_factory,
    queue_of,
)
from asl_vllm_testing.toy import SHAPE, ToyDecoder


def launches_of(works: list[PrefillJob], *, packed: int, **way: Any) -> Counter[str]:
    """Kernels that a GPU would be sent for prompts, and calls of the model."""
    launches = Launches()

    def scored(*args: Any, **kwargs: Any) -> Any:
        launches.names += ["score"] * 4  # as in asl_kernels.window_scores.triton
        with _disable_current_modes():
            return window_scores(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        for module in (base, together):
            patched.setattr(module, "window_scores", scored)
        for name in ("run_layer", "write_kept", "load_prefixes", "run_at"):
            patched.setattr(
                ToyDecoder, name, lambda *_, name=name: launches.names.append(name)
            )
        queue, _ = queue_of(works, packed=packed, **way)
        with torch.inference_mode(), launches:
            drain(queue)
    return Counter(launches.names)


class WideToy(ToyDecoder):
    """One that a prompt longer than the toy's capacity passes, unseen."""

    def _attend(self, layer: int, q: Tensor, *rest: Any) -> Tensor:
        return q.new_zeros(len(q), SHAPE.num_heads, SHAPE.value_dim)


def test_eight_prompts_cost_the_passes_of_one_that_is_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the launches that score a layer, and the waits of the host for the device."""
    counts = {"scores": 0, "reads": 0}
    score, read = together.window_scores, Tensor.tolist

    def count_scores(*args: Any, **kwargs: Any) -> Any:
        counts["scores"] += 1
        return score(*args, **kwargs)

    queue, model = queue_of(jobs(*[("asl", 40, 20)] * 8), tau=0.0)
    queue.step(1)  # one pass, and no look at it
    monkeypatch.setattr(together, "window_scores", count_scores)
    with monkeypatch.context() as patched:
        # What a toy decoder reads for itself is not of interest.
        patched.setattr(ToyDecoder, "run_layer", lambda *_: None)
        patched.setattr(ToyDecoder, "write_kept", lambda *_: None)

        def count_reads(self: Tensor) -> Any:
            counts["reads"] += 1
            return read(self)

        patched.setattr(Tensor, "tolist", count_reads)
        before = len(model.calls)
        drain(queue)
    assert before == 1
    # Each checked layer, from l_min 1 on; the last look finds nothing left.
    assert counts == {"scores": LAYERS - 1, "reads": LAYERS - 1}

    queue, model = queue_of(jobs(*[("snapkv", 40, 20)] * 8))
    drain(queue)
    long, other = queue_of(jobs(("snapkv", 8 * 40, 20)), WideToy())
    drain(long)
    assert len(model.calls) == len(other.calls) == LAYERS


def test_the_model_and_scores_are_launched_once_for_all() -> None:
    works = jobs(*[("snapkv", 40, 20)] * 4)
    one, alone = launches_of(works[:1], packed=1), launches_of(works, packed=1)
    packed = launches_of(works, packed=4)
    for name in ("run_layer", "score"):
        assert packed[name] == one[name] == alone[name] / 4 > 0
    # So is what each prompt keeps; finding the rows of all takes a few more.
    shared = packed["run_layer"] + packed["score"]
    assert packed["aten::topk"] == one["aten::topk"] == alone["aten::topk"] / 4
    assert packed.total() - shared <= 0.7 * (alone.total() - 4 * shared)


def test_the_document_counts_as_this_does() -> None:
    works = jobs(*[("snapkv", 40, 20)] * 8)
    alone, packed = launches_of(works, packed=1), launches_of(works, packed=8)
    # What vLLM's Llama launches a layer: tests/contract/test_stages.py.
    totals = [c.total() + 14 * c["run_layer"] for c in (packed, alone)]
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text("utf-8")
    assert "are {:,} launches, and {:,} one by one.".format(*totals) in page


@pytest.mark.parametrize("policy", ["snapkv", "asl"])
def test_hits_are_loaded_run_and_scored_once_for_all(policy: str) -> None:
    """A hit alone costs a model's launches for a handful of rows, layer by layer."""
    kinds, way = [(policy, 40, 20)] * 8, {"selection_layer": 2}
    works = [
        dataclasses.replace(work, reused_block_ids=[list(range(34))])
        for work in jobs(*kinds)
    ]
    one = launches_of(works[:1], packed=1, **way)
    alone = launches_of(works, packed=1, **way)
    packed = launches_of(works, packed=8, **way)
    shared = ["run_layer", "score", "load_prefixes"]
    shared += ["run_at"] if policy == "asl" else []
    for name in shared:
        assert packed[name] == one[name] == alone[name] / 8 > 0
    # What heads keep is chosen for all, and what goes deeper, after one layer, of each.
    assert packed["aten::topk"] * 2 < alone["aten::topk"]
    # The rest is what is gathered and written of each, and the check of its scores.
    # Rows have gaps between them: they are put together and back.
    assert packed.total() < 0.7 * alone.total()


def test_no_pass_is_longer_than_a_chunk() -> None:
    queue, model = queue_of(jobs(*[("asl", 30 + n, 10) for n in range(30)]))
    drain(queue, 1)
    sizes = [len(call.positions) for call in model.calls]
    assert max(sizes) <= CHUNK
    assert max(sizes) > CHUNK - 60, "or packs are smaller than they may be"


def test_a_step_spends_no_more_than_it_may() -> None:
    queue, model = queue_of(jobs(*MIXED), tau=0.0)
    while len(queue):
        before = sum(len(call.positions) for call in model.calls)
        queue.step(400)
        assert sum(len(call.positions) for call in model.calls) - before <= 400


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """A long one passes alone, before it or after it; others are no longer than it."""
    works = jobs(("asl", 20, 9), ("asl", 81, 9), ("asl", 30, 9), ("asl", 31, 9))
    queue, model = queue_of(works, tau=0.0)
    ended = []
    while len(queue):
        ended.append([outcome.request_id for outcome in queue.step(1)])
    assert [names for names in ended if names] == [["0"], ["1"], ["2", "3"]]
    assert len(model.calls) == 3 * LAYERS


def test_those_that_start_over_are_not_waited_for() -> None:
    works = jobs(("gemfilter", 30, 20), ("snapkv", 31, 20), ("snapkv", 32, 20))
    queue, model = queue_of(works, selection_layer=3)
    ended = []
    while len(queue):
        ended += [(o.request_id, len(model.calls)) for o in queue.step(1)]
    assert ended == [("1", LAYERS), ("2", LAYERS), ("0", 2 * LAYERS)]


def test_who_runs_together() -> None:
    factory = made_factory(ToyDecoder(), packed=4)
    packer = Packer(factory)
    eight = jobs(*[("asl", 40, 20)] * 8)
    assert packer.count(eight, ()) == 4, "as many as have window queries"
    assert packer.count(eight, {"2"}) == 2
    assert packer.count(eight, {"0"}) == 1
    assert packer.count(jobs(("asl", 80, 20), ("asl", 80, 20)), ()) == 2
    assert packer.count(jobs(("asl", 80, 20), ("asl", 81, 20)), ()) == 1
    assert packer.count(jobs(("asl", 81, 20), ("asl", 80, 20)), ()) == 1
    more = Packer(made_factory(ToyDecoder(), packed=100))
    assert more.count(jobs(*[("asl", 40, 20)] * 9), ()) == 8, "as many as fit a chunk"
    paged = Packer(made_factory(ToyDecoder(), packed=100), page=128)
    assert paged.count(eight, ()) == 2, "each in pages of its own"


def test_window_queries_are_reserved_for_as_many_as_fit() -> None:
    assert [most_packed(chunk, 32) for chunk in (16, 67, 68, 8192)] == [1, 1, 2, 32]
