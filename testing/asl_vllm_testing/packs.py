"""Short prompts that pass the toy decoder together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from asl_vllm.prefill import (
    Packer,
    PrefillBuffers,
    PrefillFactory,
    PrefillJob,
    PrefillOutcome,
    PrefillQueue,
    PrefillReport,
)
from asl_vllm_testing.toy import SHAPE, WINDOW, ToyDecoder, config, job

LAYERS = SHAPE.num_layers
CHUNK = 320
"""Room for all the prompts here: each is at most a quarter."""
PLENTY = 10**9
MIXED = [
    ("asl", 44, 24),
    ("snapkv", 70, 50),
    ("gemfilter", 31, 20),
    ("fastkv", 52, 40),
    ("asl", 17, 2),
    ("pyramidinfer", 40, 30),
    ("gemfilter", 20, 9),
    ("asl", 38, 33),
]
"""Policies, tokens and pruned tokens of prompts."""


class Again(ToyDecoder):
    """Lets a slot be written again: by a prompt that starts anew."""

    failing: tuple[int, int] | None = None
    """Layer and tokens of a pass that fails, once."""

    def write_kept(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        for slot in slots.tolist():
            self.written.pop((layer, slot), None)
        super().write_kept(layer, keys, values, slots)

    def run_layer(self, layer: int, positions: Tensor, *args: Any) -> None:
        if (layer, len(positions)) == self.failing:
            self.failing = None
            raise torch.OutOfMemoryError("injected")
        super().run_layer(layer, positions, *args)


def jobs(*kinds: tuple[str, int, int], bands: int = 1) -> list[PrefillJob]:
    """Jobs "0", "1" and so on, each with slots of its own."""
    made = []
    for index, (policy, n, pruned) in enumerate(kinds):
        work = job(str(index), n, pruned, policy)
        rows = [
            [slot + 10_000 * (index + 100 * band) for slot in work.block_ids[0]]
            for band in range(bands)
        ]
        made.append(dataclasses.replace(work, block_ids=rows))
    return made


def jobs_of_two_bands() -> list[PrefillJob]:
    """Four; every other keeps all tokens to the end of the selection layer's band."""
    made = []
    for index, work in enumerate(jobs(*[("asl", 40 + n, 20) for n in range(4)])):
        full = index % 2 == 0
        held = work.num_prompt_tokens - 1 - (0 if full else work.pruned_tokens)
        rows = [[b * 1000 + 10_000 * index + s for s in range(held)] for b in range(2)]
        made.append(dataclasses.replace(work, block_ids=rows, keep_shallow=full))
    return made


def made_factory(
    model: ToyDecoder, *, host: bool = False, packed: int = 8, **options: Any
) -> PrefillFactory:
    held = PrefillBuffers(
        model.shape, CHUNK, WINDOW, packed=packed, host_chunk=CHUNK if host else None
    )
    return PrefillFactory(model, held, config(**options), CHUNK)


def queue_of(
    works: list[PrefillJob], model: ToyDecoder | None = None, **options: Any
) -> tuple[PrefillQueue, ToyDecoder]:
    model = model or ToyDecoder()
    factory = made_factory(model, **options)
    queue = PrefillQueue(factory, Packer(factory))
    for work in works:
        queue.add(work)
    return queue, model


def drain(queue: PrefillQueue, token_layers: int = PLENTY) -> list[PrefillOutcome]:
    outcomes = []
    for _ in range(1000):
        if not len(queue):
            return outcomes
        outcomes += queue.step(token_layers)
    raise AssertionError("the queue does not come to an end")


def equal_to_alone(
    works: list[PrefillJob],
    model: ToyDecoder,
    outcomes: list[PrefillOutcome],
    **options: Any,
) -> None:
    """Reports, and what is in the pool, are those of each job alone, to the bit."""
    assert sorted(o.request_id for o in outcomes) == sorted(w.request_id for w in works)
    written: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    reports: dict[str, PrefillReport] = {}
    for work in works:
        alone = ToyDecoder(shape=model.shape, pool=model.pool)
        prefill = made_factory(alone, **options)(work)
        prefill.advance(PLENTY)
        written |= alone.written
        reports[work.request_id] = prefill.report()
    assert model.written.keys() == written.keys()
    for place, (key, value) in written.items():
        assert torch.equal(model.written[place][0], key), place
        assert torch.equal(model.written[place][1], value), place
    for outcome in outcomes:
        assert outcome.report is not None, outcome.error
        want = dataclasses.replace(
            reports[outcome.request_id], seconds=outcome.report.seconds
        )
        assert outcome.report == want
