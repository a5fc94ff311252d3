"""Answers without a server: for small models, and many policies at once.

Prefills and policies are asl_vllm's own. Below them is a decoder in plain PyTorch
that runs each prompt's unpruned layers once for all policies and budgets, so that a
study takes a fraction of a server's time. tests/e2e holds its answers against vLLM's.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from asl_vllm.config import POLICY_NAMES, AslConfig
from asl_vllm.prefill import PrefillBuffers, PrefillFactory, PrefillJob
from asl_vllm.selection import minimum_budget
from benchmarks.accuracy.cells import FULL, Cell, cells, check_policies
from benchmarks.accuracy.client import Reply, Served
from benchmarks.accuracy.continuation import Cache
from benchmarks.accuracy.controls import CONTROLS
from benchmarks.accuracy.fidelity import Fidelity, of_logits
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.replies import Record, Replies
from benchmarks.accuracy.run import Plan, record, shortened_prompt
from benchmarks.accuracy.shared_layers import FusedDecoder, SharedLayers
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tokens import HubTokenizer

BLOCK_SIZE = 32
"""The README's; vLLM's own is 16, and 128 on CPUs."""


@dataclass(frozen=True)
class Variant:
    """What one server would be: options, and the policies asked under them."""

    config: AslConfig
    served: Served
    policies: tuple[str, ...]
    name: str = ""
    """What is added to a policy's label, to tell variants apart."""


@dataclass(frozen=True)
class Source:
    """Where prompts and answers come from; see `PromptMaker` and `HubTokenizer`."""

    model: str
    template: str
    split: str
    seed: int
    device: str = "cpu"


Asked = tuple[Variant, Cell, list[int]]
"""What is asked, with the token ids that are sent: the prompt's, or a control's."""
Place = tuple[str, int, int]
"""Task, length and number of a prompt."""


def variant(
    model: str,
    block_size: int,
    config: Mapping[str, Any],
    policies: Sequence[str],
    name: str = "",
) -> Variant:
    """What a server of ``model`` would say of itself under these options.

    Raises:
        ConfigError: ``config`` is none of ``--kv-policy-config``.
        CellError: There is no such policy.
    """
    facts = json.loads((Path(model) / "config.json").read_text())
    num_layers = facts["num_hidden_layers"]
    options = AslConfig.from_dict({"policy": "asl", **config})
    options.check_depth(num_layers)
    served = Served(
        model=Path(model).name,
        root=model,
        policies=POLICY_NAMES,
        num_layers=num_layers,
        window=options.window,
        block_size=block_size,
        minimum_budget=minimum_budget(options.window, block_size),
        max_model_len=facts["max_position_embeddings"],
        config={**options.to_dict(), **options.resolved_rule(num_layers)},
    )
    check_policies(policies, served)
    return Variant(options, served, tuple(policies), name)


class DirectModel:
    """A model that answers one prompt under many policies."""

    def __init__(
        self, model: str, capacity: int, window: int, device: str = "cpu"
    ) -> None:
        self._tokens = HubTokenizer(model, "none")
        self.layers = SharedLayers(FusedDecoder.load(model, device=device))
        self._buffers = PrefillBuffers(self.layers.shape, capacity, window)
        # What a control asks is another prompt, and so must not evict this one.
        self._control = SharedLayers(self.layers.model)

    @torch.inference_mode()
    def replies(
        self, asked: Sequence[Asked], max_tokens: int, guess: str = ""
    ) -> list[Reply]:
        """Answers to the prompt that ``layers`` is at, as servers reply.

        ``guess``: what they may be; if right, they are found faster, all together.
        """
        if not asked:
            return []
        prefills = [self._prefilled(*one) for one in asked]
        answers = self.layers.answers(
            [cache for cache, _ in prefills],
            max_tokens,
            self._tokens.eos,
            self._tokens.ids(guess),
            [len(ids) - 1 for _, _, ids in asked],
        )
        return [
            Reply(self._tokens.decode(answer), len(ids), report)
            for answer, (_, _, ids), (_, report) in zip(
                answers, asked, prefills, strict=True
            )
        ]

    def reply(
        self,
        variant: Variant,
        cell: Cell,
        ids: list[int],
        max_tokens: int,
        guess: str = "",
    ) -> Reply:
        """One of `replies`."""
        (reply,) = self.replies([(variant, cell, ids)], max_tokens, guess)
        return reply

    @torch.inference_mode()
    def fidelities(
        self, asked: Sequence[Asked], max_tokens: int
    ) -> list[tuple[Reply, Fidelity]]:
        """The prompt's own answer, forced on each cell's cache."""
        eos, layers = self._tokens.eos, self.layers
        full = layers.unpruned_cache()
        (own,) = layers.answers([full], max_tokens, eos, ())
        tokens = [*own, eos] if eos is not None and len(own) < max_tokens else own
        prefills = [self._prefilled(*one) for one in asked]
        ends = [len(ids) - 1 for _, _, ids in asked]
        truth, *forced = layers.forced_hidden(
            [full, *(cache for cache, _ in prefills)],
            tokens[:-1],
            [layers.num_tokens - 1, *ends],
        )
        wanted, text = layers.model.logits(truth.hidden), self._tokens.decode(own)
        return [
            (
                Reply(text, len(ids), report),
                of_logits(wanted, layers.model.logits(one.hidden)),
            )
            for one, (_, _, ids), (_, report) in zip(
                forced, asked, prefills, strict=True
            )
        ]

    def _prefilled(
        self, variant: Variant, cell: Cell, ids: list[int]
    ) -> tuple[Cache, dict[str, Any] | None]:
        """What is left of the prompt's cache, and what a server reports of that."""
        if cell.policy in CONTROLS:
            self._control.begin_prompt(ids)
            return self._control.unpruned_cache(), None
        if cell.policy == FULL:
            return self.layers.unpruned_cache(), None
        assert cell.budget is not None
        kept = variant.served.kept(cell.budget, len(ids))
        job = PrefillJob(
            request_id="direct",
            policy=cell.policy,
            prompt_token_ids=ids,
            pruned_blocks=len(ids) - kept,
            block_size=1,
            block_ids=[range(kept - 1)],
        )
        factory = PrefillFactory(self.layers, self._buffers, variant.config, len(ids))
        self.layers.begin_prefill()
        prefill = factory(job)
        while not prefill.done:
            prefill.advance(len(ids))
        report = prefill.report()
        return self.layers.cache, {
            "kept_tokens": job.kept_tokens,
            "selection_layer": report.selection_layer,
            "skipped_token_layers": report.skipped_token_layers,
        }


class _Worker:
    """What a process keeps between prompts."""

    def __init__(self, source: Source, plan: Plan, made: Sequence[Variant]) -> None:
        torch.set_num_threads(1)
        tokenizer = HubTokenizer(source.model, source.template)
        self._bos = tokenizer.bos
        self._maker = PromptMaker(tokenizer, split=source.split, seed=source.seed)
        window = made[0].config.window
        self._model = DirectModel(
            source.model, max(plan.lengths), window, source.device
        )
        self._plan, self._made = plan, made

    def records(self, place: Place, done: frozenset[tuple[str, Any]]) -> list[Record]:
        """A record for each cell of a prompt that is not ``done``."""
        name, length, index = place
        task = TASKS[name]
        prompt = self._maker.prompt(task, length, index)
        self._model.layers.begin_prompt(prompt.token_ids)
        asked = [
            (variant, cell)
            for variant, cell in asked_of(self._made, self._plan, length)
            if (cell.label, cell.budget) not in done
        ]
        triples = [
            (
                variant,
                cell,
                shortened_prompt(
                    prompt.token_ids, cell, variant.served, self._bos, place
                )
                if cell.policy in CONTROLS
                else prompt.token_ids,
            )
            for variant, cell in asked
        ]
        size = task.max_tokens
        found: list[tuple[Reply, Fidelity | None]]
        if task.own_answer:
            found = [*self._model.fidelities(triples, size)]
        else:
            replies = self._model.replies(triples, size, prompt.answers[0])
            found = [(reply, None) for reply in replies]
        return [
            record(
                *(task, length, index, cell, prompt),
                *(reply, reply.prompt_tokens, variant.served),
                fidelity=near,
            )
            for (variant, cell), (reply, near) in zip(asked, found, strict=True)
        ]


def asked_of(
    made: Sequence[Variant], plan: Plan, length: int
) -> list[tuple[Variant, Cell]]:
    """Each cell of prompts of a length once, and the variant it is asked under."""
    found: dict[tuple[str, int | None], tuple[Variant, Cell]] = {}
    for variant in made:
        for cell in cells(variant.policies, plan.budgets, length, variant.served):
            if cell.policy not in (FULL, *CONTROLS):
                cell = replace(cell, label=cell.label + variant.name)
            found.setdefault((cell.label, cell.budget), (variant, cell))
    return list(found.values())


_worker: _Worker


def _start(source: Source, plan: Plan, made: Sequence[Variant]) -> None:
    global _worker
    _worker = _Worker(source, plan, made)


def _work(task: tuple[Place, frozenset[tuple[str, Any]]]) -> list[Record]:
    return _worker.records(*task)


def answer_all(
    source: Source,
    plan: Plan,
    made: Sequence[Variant],
    replies: Replies,
) -> None:
    """Adds to ``replies`` what they have not; ``plan.concurrency`` processes work."""
    pool = ProcessPoolExecutor(
        plan.concurrency,
        multiprocessing.get_context("spawn"),
        _start,
        (source, plan, made),
    )
    with pool:
        todo = list(_todo(plan, made, replies))
        for found in tqdm(pool.map(_work, todo), "prompts", len(todo)):
            for reply in found:
                replies.add(reply)


def _todo(
    plan: Plan, made: Sequence[Variant], replies: Replies
) -> Iterator[tuple[Place, frozenset[tuple[str, Any]]]]:
    """In turn a prompt of each kind: a run that ends early has as many of each."""
    wanted = {
        length: [cell for _, cell in asked_of(made, plan, length)]
        for length in plan.lengths
    }
    for place in itertools.product(range(plan.n), plan.lengths, plan.tasks):
        index, length, name = place
        done = [
            cell for cell in wanted[length] if replies.has(name, length, index, cell)
        ]
        if len(done) < len(wanted[length]):
            yield (
                (name, length, index),
                frozenset((cell.label, cell.budget) for cell in done),
            )
