"""The load and the faults of a soak run, over an in-process engine."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from vllm import SamplingParams
from vllm.outputs import CompletionOutput
from vllm.v1.engine.core import EngineCore

from asl_vllm.engine.scheduler.integrity import IntegrityError
from asl_vllm.prefill.pack import Pack
from asl_vllm_testing.harness import Engine
from asl_vllm_testing.poison import poison_unowned
from tests.soak.items import MAX_TOKENS, RULE, Item
from tests.soak.report import Report

POOL_TOKENS = 1536
ENGINE: dict[str, Any] = {
    "policy": {"policy": "asl", "check_integrity": True, **RULE},
    "pool_tokens": POOL_TOKENS,
    "max_num_batched_tokens": 512,
}
MOST_AT_ONCE = 8
REST_EVERY = 100
"""Requests after which all are awaited and the pool must be whole."""
STUCK_STEPS = 3000
FAULTS = (
    *("abort", "error", "memory", "nan", "preempt", "reset", "poison"),
    *("pause", "reset running", "retry"),
)


@dataclass
class Asked:
    """A request that has not ended."""

    item: Item
    samples: int
    reuse: str
    internal: str
    """The id that the engine gave it."""
    ended: dict[int, CompletionOutput] = field(default_factory=dict)

    def id_of(self, sample: int) -> str:
        """The scheduler's name of a sample."""
        return self.internal if self.samples == 1 else f"{sample}_{self.internal}"


class Soak:
    """Keeps an engine busy, hurts it, and checks every answer."""

    def __init__(self, host: Engine, items: list[Item], seed: int) -> None:
        self.report = Report()
        self._host = host
        self._items = items
        self._rng = random.Random(seed)
        self._last = 0
        self._live: dict[str, Asked] = {}
        self._victims: set[str] = set()
        self._spared: set[str] = set()
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
            item = self._choose()
            place = self._rng.randrange(MAX_TOKENS)
            # The first four tokens of the vocabulary have no words.
            if self._rng.random() < 0.3 and item.answer[place] >= 4:
                item = item.stopped(place)
            samples = self._rng.choice((1, 1, 1, 3))
            reuse = self._rng.choice(("none", "none", "read", "fill"))
            reuse = reuse if item.budget else "none"
            self._add(f"soak{self.report.asked.total()}", item, samples, reuse)
            self.report.asked["pruned" if item.budget else "full attention"] += 1
            self.report.asked["to a stop string"] += item.stop is not None
            self.report.asked["of several samples"] += samples > 1
            self.report.asked["reading prefixes"] += reuse == "read"
            self.report.asked["filling prefixes"] += reuse == "fill"

    def _choose(self) -> Item:
        """Often one of the next to the last: the same again, or one that begins so."""
        count = len(self._items)
        near = self._rng.random() < 0.5
        step = self._rng.randrange(3) if near else self._rng.randrange(count)
        self._last = (self._last + step) % count
        return self._items[self._last]

    def _add(self, name: str, item: Item, samples: int, reuse: str) -> None:
        # vLLM refuses several samples at temperature 0. Of one token to choose from the
        # samples are equal too.
        greedy = {"temperature": 0} if samples == 1 else {"n": samples, "top_k": 1}
        params = SamplingParams(
            **greedy,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            stop=item.stop,
            extra_args={"kv_budget": item.budget, "kv_reuse": reuse},
        )
        prompt: Any = {"prompt_token_ids": list(item.prompt)}
        internal = self._host.llm.llm_engine.add_request(name, prompt, params)
        self._live[name] = Asked(item, samples, reuse, internal)

    def _step(self) -> None:
        self.report.steps += 1
        for output in self._host.llm.llm_engine.step():
            asked = self._live.get(output.request_id)
            if asked is None:
                continue
            for sample in output.outputs:
                if sample.finished():
                    asked.ended[sample.index] = sample
                    self._judge(output.request_id, asked, sample)
                    if sample.finish_reason != "error":
                        self._check_report(asked, output.kv_transfer_params)
            if len(asked.ended) == asked.samples:
                del self._live[output.request_id]
        for request in self._host.scheduler.requests.values():
            if request.num_preemptions:
                self._preempted.add(request.request_id)
        self.report.preempted = len(self._preempted)

    def _judge(self, name: str, asked: Asked, got: CompletionOutput) -> None:
        item, said = asked.item, list(got.token_ids)
        sample = asked.id_of(got.index)
        if sample in self._spared and said == item.answer:
            right = True
            self.report.ended["right"] += 1
        elif sample in self._victims:
            # After a preemption the prompt is pruned again, and that may fail too.
            right = got.finish_reason == "error" and said == item.answer[: len(said)]
            self.report.ended["failed as injected"] += right
        else:
            right = said == item.answer
            self.report.ended["right"] += right
        if not right:
            self.report.wrong.append(
                f"{name}, sample {got.index}, reuse {asked.reuse}: budget "
                f"{item.budget}, prompt of {len(item.prompt)}: {got.finish_reason} "
                f"{said}, expected {item.answer}"
            )

    def _check_report(self, asked: Asked, told: dict[str, Any] | None) -> None:
        """What the reply says, however the request ended."""
        pruned = told["pruned_tokens"] if told else 0
        if pruned != asked.item.pruned_tokens:
            self.report.wrong.append(f"{asked.internal}: pruned {pruned}")
        if told and pruned:
            shared, read = told["shared_prefills"], told["reused_tokens"]
            how = "from a twin" if shared else "over a prefix" if read else "alone"
            how = "over a filled prefix" if told["filled_tokens"] else how
            self.report.prefills[how] += 1

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
            self._hang_up(self._rng.choice(list(self._live)))
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
            self._take_back()
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

    def _take_back(self) -> None:
        """All blocks are about to be: what failed in the last step may begin anew.

        The engine hears of it a step later, and forgets it if the prefill is no more.
        """
        self._spared |= self._victims

    def _hang_up(self, name: str) -> Asked:
        asked = self._live.pop(name)
        self._host.llm.llm_engine.abort_request([name], internal=False)
        return asked

    def _pause(self) -> None:
        """Nothing moves meanwhile, with caches cleared or kept.

        What lost its blocks to a reset may be dropped, if there is a step to say so in.
        """
        clears = self._rng.random() < 0.5
        if clears:
            self._take_back()
        self._core.pause_scheduler("keep", clear_cache=clears)
        before = self._host.queue.progress()
        for _ in range(3):
            self._step()
        after = self._host.queue.progress()
        if not after.items() <= before.items():
            self.report.wrong.append(
                f"a prefill went on during a pause, caches cleared {clears}: from "
                f"{before} to {after}"
            )
        self._core.resume_scheduler()

    def _retry(self, name: str) -> None:
        """A client hangs up and asks again at once, under the same internal id."""
        asked = self._hang_up(name)
        names = {asked.id_of(sample) for sample in range(asked.samples)}
        self._victims -= names
        self._spared -= names
        plain = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
        with patch.dict(os.environ, plain):
            self._add(asked.internal, asked.item, asked.samples, asked.reuse)

    def _arm(self, model: Any) -> None:
        """The next pass, or the next sum of scores, fails once a fault is armed."""
        run_layer, sum_over_ranks = model.run_layer, model.sum_over_ranks

        def failing_layer(layer: int, *args: Any) -> None:
            running = self._host.queue._running
            packed = isinstance(running, Pack)
            if packed and layer == 0:
                self.report.prefills["begun with others"] += len(running.prefills)
            if isinstance(self._armed, Exception):
                error, self._armed = self._armed, None
                # Those of a pack run again, alone.
                self.report.prefills["packs failed"] += packed
                if not packed:
                    self._victims.add(running.job.request_id)
                raise error
            run_layer(layer, *args)

        def failing_sum(score: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = sum_over_ranks(score)
            if self._armed == "nan":
                self._armed = None
                self._victims.add(self._host.queue._running.job.request_id)
                return torch.full_like(total, float("nan"))
            return total

        model.run_layer, model.sum_over_ranks = failing_layer, failing_sum
