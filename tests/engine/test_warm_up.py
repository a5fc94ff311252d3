"""What runs before requests runs every kernel that they will need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from asl_vllm.engine.worker.warm_up import warm_up
from asl_vllm.prefill import Known, Packer, PrefillFactory, hidden, prompt, tap
from asl_vllm.selection import settling, together
from asl_vllm.selection.policies import POLICIES, base, policies_beside_windows
from asl_vllm_testing import toy
from asl_vllm_testing.toy import ToyDecoder

CHUNK = 40
BLOCK = 32


class Quiet(ToyDecoder):
    """Notes slots that are written, blocks that are read, and rows that run again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.slots: set[int] = set()
        self.read: set[int] = set()
        self.again: list[int] = []
        self.together = 0

    def write_kept(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        assert len(keys) == len(values) == len(slots)
        self.slots.update(slots.tolist())

    def load_prefixes(
        self, layer: int, block_ids: Tensor, into: Sequence[Known], *args: Any
    ) -> None:
        """As of an empty pool."""
        rows = sum(len(own.keys) for own in into)
        assert rows == len(block_ids) * BLOCK
        self.read.update(block_ids.tolist())
        self.together = max(self.together, len(into))
        first = into[0]
        self.pool[layer] = (
            first.keys.new_zeros(rows, *first.keys.shape[1:]),
            first.values.new_zeros(rows, *first.values.shape[1:]),
        )
        super().load_prefixes(layer, torch.arange(rows), into, *args)

    def run_at(self, layer: int, positions: Tensor, *args: Any) -> None:
        self.again.append(len(positions))
        super().run_at(layer, positions, *args)


def factory(
    capacity: int = toy.CAPACITY, chunk: int = CHUNK, **options: Any
) -> PrefillFactory:
    return toy.factory(Quiet(), chunk=chunk, capacity=capacity, packed=2, **options)


KERNELS: tuple[tuple[ModuleType, str], ...] = (
    (base, "window_scores"),
    (prompt, "gather_kept"),
    (hidden, "gather_tokens"),
    (settling, "descending_ranks"),
    (settling, "rank_variance"),
)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_that_requests_need_has_run_before(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[str] = set()

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.add(name)
            return function(*args, **kwargs)

        return call

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    made = factory(policy=policy)
    warm_up(made, POLICIES, 1, Packer(made))
    assert ran == {name for _, name in KERNELS}
    model = made.model
    assert isinstance(model, Quiet)
    sizes = {len(call.positions) for call in model.calls}
    # A full chunk and one token, and numbers of 16 and others.
    assert {CHUNK, 1, 32, 33} <= sizes
    assert model.slots == {PAD_SLOT_ID}


def test_prompts_have_run_together_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one launch that scores several."""
    score, scored = together.window_scores, []

    def note(*args: Any, lengths: Any, **kwargs: Any) -> Any:
        scored.append(tuple(lengths))
        return score(*args, lengths=lengths, **kwargs)

    monkeypatch.setattr(together, "window_scores", note)
    made = factory(capacity=400, chunk=400, policy="asl")
    warm_up(made, POLICIES, 1, Packer(made))
    assert {len(lengths) for lengths in scored} == {2}
    model = made.model
    assert isinstance(model, Quiet)
    alone = sum(call.layer == 0 and call.start == 0 for call in model.calls)
    assert alone > len(POLICIES)
    assert model.slots == {PAD_SLOT_ID}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bands", [1, 5])
def test_prompts_have_read_the_pool_before(policy: str, bands: int) -> None:
    """And what is selected of it went through the layers again, where a policy does so.

    `gemfilter` begins anew instead, and `snapkv` selects for no deeper layer.
    """
    made = factory(bands=bands)
    warm_up(made, [policy], bands, Packer(made), BLOCK)
    model = made.model
    assert isinstance(model, Quiet)
    assert model.read == {0}
    assert bool(model.again) == (policy not in ("snapkv", "gemfilter"))
    assert model.slots == {PAD_SLOT_ID}


def test_rows_with_gaps_have_passed_layers_with_a_window_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend, seen = tap.attention_at, []

    def note(*args: Any, window: int, **kwargs: Any) -> None:
        seen.append(window)
        attend(*args, window=window, **kwargs)

    monkeypatch.setattr(tap, "attention_at", note)
    windows, groups = (7, None, 7, None, 7), (0, 0, 1, 1, 0)
    shape = dataclasses.replace(toy.SHAPE, windows=windows, groups=groups)
    made = toy.factory(Quiet(shape), chunk=CHUNK)
    warm_up(made, policies_beside_windows(), 1, Packer(made))
    model = made.model
    assert isinstance(model, Quiet)
    assert set(seen) == {7}
    assert model.slots == {PAD_SLOT_ID}


def test_prompts_have_read_together_before() -> None:
    made = factory(capacity=400, chunk=400)
    warm_up(made, POLICIES, 1, Packer(made), BLOCK)
    assert made.model.together == 2  # type: ignore[attr-defined]


def test_nothing_is_read_where_requests_cannot() -> None:
    made = factory()
    warm_up(made, POLICIES, 1, Packer(made), None)
    assert made.model.read == set()  # type: ignore[attr-defined]


def test_requests_find_the_policies_they_ask_for() -> None:
    made = factory()
    asked: list[str] = []

    class Noting(PrefillFactory):
        def __call__(self, job: Any) -> Any:
            asked.append(job.policy)
            return super().__call__(job)

    noting = Noting(made.model, made.buffers, made.config, made.chunk_tokens)
    warm_up(noting, POLICIES, 1, Packer(noting))
    assert set(asked) == set(POLICIES)


def test_bands_have_slots_of_their_own() -> None:
    made = factory(bands=5)
    warm_up(made, ["asl"], 5, Packer(made))
    assert made.model.slots == {PAD_SLOT_ID}  # type: ignore[attr-defined]


@pytest.mark.parametrize("capacity", [10, 13, 33, CHUNK])
def test_short_buffers_are_not_outgrown(capacity: int) -> None:
    made = factory(capacity=capacity)
    warm_up(made, POLICIES, 1, Packer(made), BLOCK)
    sizes = {len(call.positions) for call in made.model.calls}  # type: ignore[attr-defined]
    assert max(sizes, default=0) <= capacity


def test_scores_that_are_not_finite_do_not_end_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = factory(policy="snapkv")
    made.model.poison = {0}  # type: ignore[attr-defined]
    warm_up(made, ["snapkv"], 1, Packer(made))
    assert made.model.slots == {PAD_SLOT_ID}  # type: ignore[attr-defined]
