"""The load, the faults and the accounts of a soak run, over an in-process engine."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm.v1.engine.core import EngineCore

from asl_vllm.engine.scheduler.integrity import IntegrityError
from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing.harness import BLOCK, Engine, Running, add
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.poison import poison_unowned

POOL_TOKENS = 1024
RULE: dict[str, Any] = {
    "window": 16,
    "pool_kernel": 7,
    "l_min": 2,
    "l_obs": 3,
    "tau": 0.6,
}
ENGINE: dict[str, Any] = {
    "policy": {"policy": "asl", "check_integrity": True, **RULE},
    "pool_tokens": POOL_TOKENS,
    "max_num_batched_tokens": 256,
}
MAX_TOKENS = 24
MOST_AT_ONCE = 12
REST_EVERY = 100
"""Requests after which all are awaited and the pool must be whole."""
STUCK_STEPS = 3000
FAULTS = (
    *("abort", "error", "memory", "nan", "preempt", "reset", "poison"),
    *("pause", "reset running", "retry"),
)


@dataclass
class Item:
    """A prompt and a budget, and what the oracle answers to them."""

    prompt: list[int]
    budget: int | None
    answer: list[int]
    stop: str | None = None
    """Text that ends the answer."""


def stopped(item: Item, place: int) -> Item:
    """The same question, to be ended by the word of the answer's token at ``place``."""
    words = [f"w{token}" for token in item.answer]
    end = next(i for i, word in enumerate(words) if words[place] in word)
    return Item(item.prompt, item.budget, item.answer[: end + 1], words[place])


def catalogue(
    model: Path, items: int, *, longest: int = 1500, seed: int = 0
) -> list[Item]:
    """Prompts of which many share beginnings; answers in plain fp32 PyTorch."""
    rng = random.Random(seed)
    oracle = TinyDecoder.load(model)
    beginnings = [[rng.randrange(4, 512) for _ in range(400)] for _ in range(4)]
    made = []
    for number in range(items):
        budget = None if number % 3 == 0 else rng.randrange(48, 300)
        most = (500 if budget is None else longest) - 400
        own = [rng.randrange(4, 512) for _ in range(rng.randrange(20, most))]
        prompt = rng.choice(beginnings)[: rng.randrange(400)] + own
        kept = resolve_kept(
            budget,
            num_prompt_tokens=len(prompt),
            block_size=BLOCK,
            window=RULE["window"],
        )
        truth = generate(oracle, prompt, kept=kept, max_tokens=MAX_TOKENS, **RULE)
        made.append(Item(prompt, budget, truth.tokens))
    return made


@dataclass
class Report:
    """What a run did and what went wrong; `ok` when nothing did."""

    asked: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    preempted: int = 0
    leaked: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.leaked and self.ended["right"] > 0

    def __str__(self) -> str:
        def table(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))

        lines = [
            f"time    {self.seconds / 60:.1f} minutes, {self.steps} steps",
            f"load    {table(self.asked)}",
            f"ended   {table(self.ended)}",
            f"faults  {table(self.faults)}; requests preempted {self.preempted}",
            f"wrong   {len(self.wrong)}",
            f"leaked  {self.leaked}",
            *self.wrong[:20],
        ]
        return "\n".join(lines)


class Soak:
    """Keeps an engine busy, hurts it, and checks every answer."""

    def __init__(self, host: Engine, items: list[Item], seed: int) -> None:
        self.report = Report()
        self._host = host
        self._items = items
        self._rng = random.Random(seed)
        self._live: dict[str, tuple[Running, Item]] = {}
        self._victims: set[str] = set()
        self._armed: BaseException | str | None = None
        self._preempted: set[str] = set()
        self._arm(host.factory.model)

    def run(self, seconds: float) -> Report:
        """Load for ``seconds``; whatever is still running then is awaited."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and not self.report.wrong:
            self._ask()
            if self._rng.random() < 0.1:
                self._fault(self._rng.choice(FAULTS))
            self._step()
            if self.report.asked.total() % REST_EVERY == 0:
                self._rest()
        self._rest()
        self.report.seconds = time.monotonic() - began
        return self.report

    def _ask(self) -> None:
        for _ in range(self._rng.randrange(3)):
            if len(self._live) >= MOST_AT_ONCE:
                return
            item = self._rng.choice(self._items)
            place = self._rng.randrange(MAX_TOKENS)
            # The first four tokens of the vocabulary have no words.
            if self._rng.random() < 0.3 and item.answer[place] >= 4:
                item = stopped(item, place)
            # Of one length: a live request is found by the beginning of its id.
            name = f"soak{self.report.asked.total():08d}"
            request = add(
                self._host,
                name,
                item.prompt,
                budget=item.budget,
                max_tokens=MAX_TOKENS,
                stop=item.stop,
            )
            self._live[name] = (request, item)
            self.report.asked["pruned" if item.budget else "full attention"] += 1
            self.report.asked["to a stop string"] += item.stop is not None

    def _step(self) -> None:
        self.report.steps += 1
        for output in self._host.llm.llm_engine.step():
            if output.finished and output.request_id in self._live:
                request, item = self._live.pop(output.request_id)
                self._judge(request, item, output.outputs[0])
        for request in self._host.scheduler.requests.values():
            if request.num_preemptions:
                self._preempted.add(request.request_id)
        self.report.preempted = len(self._preempted)

    def _judge(self, request: Running, item: Item, got: Any) -> None:
        if request.request_id in self._victims:
            # After a preemption the prompt is pruned again, and that may fail too.
            said = list(got.token_ids)
            right = got.finish_reason == "error" and said == item.answer[: len(said)]
            self.report.ended["failed as injected"] += right
        else:
            right = list(got.token_ids) == item.answer
            self.report.ended["right"] += right
        if not right:
            self.report.wrong.append(
                f"{request.external_id}: budget {item.budget}, prompt of "
                f"{len(item.prompt)}: {got.finish_reason} {list(got.token_ids)}, "
                f"expected {item.answer}"
            )

    def _rest(self) -> None:
        """Waits for all, then the pool must be whole."""
        self._armed = None
        for _ in range(STUCK_STEPS):
            if not self._host.scheduler.has_requests():
                break
            self._step()
        else:
            self.report.wrong.append(f"stuck: {sorted(self._live)}")
            return
        for name in self._live:
            self.report.wrong.append(f"{name} never ended")
        self._live.clear()
        self.report.leaked += self._host.start_free - self._host.free_blocks
        try:
            self._host.check()
        except IntegrityError as error:
            self.report.wrong.append(str(error))

    def _fault(self, kind: str) -> None:
        self.report.faults[kind] += 1
        scheduler = self._host.scheduler
        if kind == "abort" and self._live:
            name = self._rng.choice(list(self._live))
            request, _ = self._live.pop(name)
            self._host.llm.llm_engine.abort_request([request.request_id], internal=True)
            self.report.ended["aborted"] += 1
        elif kind == "error":
            self._armed = RuntimeError("injected")
        elif kind == "memory":
            self._armed = torch.OutOfMemoryError("injected")
        elif kind == "nan":
            self._armed = "nan"
        elif kind == "preempt" and scheduler.running:
            victim = self._rng.choice(scheduler.running)
            scheduler.running.remove(victim)
            scheduler._preempt_request(victim, 0.0)
        elif kind == "reset":
            scheduler.reset_prefix_cache()
        elif kind == "pause":
            self._pause()
        elif kind == "reset running":
            reset: bool = self._core.reset_prefix_cache(reset_running_requests=True)
            assert reset
        elif kind == "retry" and self._live:
            self._retry(self._rng.choice(list(self._live)))
        elif kind == "poison":
            poison_unowned(self._host)

    @property
    def _core(self) -> EngineCore:
        core: EngineCore = self._host.llm.llm_engine.engine_core.engine_core
        return core

    def _pause(self) -> None:
        """Nothing moves meanwhile, with caches cleared or kept."""
        self._core.pause_scheduler("keep", clear_cache=self._rng.random() < 0.5)
        before = self._host.queue.progress()
        for _ in range(3):
            self._step()
        if self._host.queue.progress() != before:
            self.report.wrong.append("a prefill went on during a pause")
        self._core.resume_scheduler()

    def _retry(self, name: str) -> None:
        """A client hangs up and asks again at once, under the same internal id."""
        request, item = self._live.pop(name)
        same = request.request_id
        self._host.llm.llm_engine.abort_request([same], internal=True)
        self._victims.discard(same)
        plain = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
        with patch.dict(os.environ, plain):
            again = add(
                self._host,
                same,
                item.prompt,
                budget=item.budget,
                max_tokens=MAX_TOKENS,
                stop=item.stop,
            )
        self._live[same] = (again, item)

    def _arm(self, model: Any) -> None:
        """The next pass, or the next sum of scores, fails once a fault is armed."""
        run_layer, sum_over_ranks = model.run_layer, model.sum_over_ranks

        def failing_layer(*args: Any) -> None:
            if isinstance(self._armed, Exception):
                error, self._armed = self._armed, None
                self._victims.add(self._host.queue._running.job.request_id)
                raise error
            run_layer(*args)

        def failing_sum(score: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = sum_over_ranks(score)
            if self._armed == "nan":
                self._armed = None
                self._victims.add(self._host.queue._running.job.request_id)
                return torch.full_like(total, float("nan"))
            return total

        model.run_layer, model.sum_over_ranks = failing_layer, failing_sum
