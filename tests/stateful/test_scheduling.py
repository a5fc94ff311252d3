"""vLLM's schedulers, our connector and block manager under random requests.

Whatever arrives, is aborted, preempted or fails, at any moment: the pool's books
agree after each call, no request reads another one's tokens, every request ends with
the answer it would have alone, and pruned prompts start in the order they came.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm.engine.settings import settings_of
from asl_vllm.selection.budget import minimum_budget
from asl_vllm_testing.pretend import VOCABULARY, PretendWorker, Script
from asl_vllm_testing.scheduler_host import BLOCK, make_host, planned_request

POOL = 14
"""Blocks, the null one included: a few requests outgrow it."""
WINDOW = 8
MINIMUM = minimum_budget(WINDOW, BLOCK)
LONGEST = 700
STEPS_TO_END = 3000

FAMILIES = [
    [random.Random(seed).randrange(VOCABULARY) for _ in range(LONGEST)]
    for seed in range(3)
]
"""Prompts are beginnings of these, so that many share a prefix."""


class Machine(RuleBasedStateMachine):
    """Rules are what can happen to an engine between two of its calls."""

    kind: type[Scheduler] = Scheduler
    ahead = 1
    """Steps that may be executed before their outputs are looked at."""
    pool: int = POOL
    sliding_window: int | None = None
    fewer = 1
    """Times fewer examples than the profile says."""

    def __init__(self) -> None:
        super().__init__()
        host = make_host(
            pool_blocks=self.pool,
            sliding_window=self.sliding_window,
            scheduler_class=self.kind,
            step_tokens=96,
            window=WINDOW,
            reuse="read",
            check_integrity=True,
        )
        self.scheduler = host.scheduler
        self.settings = settings_of(self.scheduler.vllm_config)
        self.manager = self.scheduler.kv_cache_manager
        self.worker = PretendWorker(
            self.pool, BLOCK, sliding_window=self.sliding_window
        )
        self.pool_tokens = host.connector.scheduler_side.pool_tokens
        self.pending: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.arrived: list[str] = []
        self._count = 0
        self.answers: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.aborted: set[str] = set()
        self.with_twins: set[str] = set()
        """Requests that had a twin at any time."""
        self.preemptions = 0
        self.reused = 0
        self.shared = 0
        self.filling: set[str] = set()
        self.filled = 0

    # What can happen.

    @rule(
        family=st.sampled_from(range(len(FAMILIES))),
        length=st.integers(1, LONGEST),
        budget=st.one_of(st.none(), st.integers(MINIMUM, 200)),
        max_tokens=st.integers(1, 70),
        fails=st.booleans(),
        reuse=st.sampled_from(["read", "fill"]),
    )
    def arrive(
        self,
        family: int,
        length: int,
        budget: int | None,
        max_tokens: int,
        fails: bool,
        reuse: str = "read",
    ) -> None:
        if budget is None:
            length = min(length, self.pool_tokens - max_tokens)
        name = f"r{self._count}"
        self._arrive(name, family, length, budget, max_tokens, fails, reuse)

    def _arrive(
        self,
        name: str,
        family: int,
        length: int,
        budget: int | None,
        max_tokens: int,
        fails: bool,
        reuse: str = "read",
    ) -> None:
        prompt = FAMILIES[family][:length]
        given = {} if budget is None else {"kv_budget": budget, "kv_reuse": reuse}
        request, plan = planned_request(
            self.settings, name, prompt, given, max_tokens=max_tokens, ignore_eos=True
        )
        self._count += 1
        pruned = plan.pruned_tokens if plan else 0
        # One that fails has a twin only where that one fails too.
        fails = fails and pruned > 0 and not self._twins(prompt, pruned)
        script = Script(name, prompt, max_tokens, pruned, fails)
        self.worker.scripts[name] = script
        twins = {one.name for one in self._twins(*script.pruned_prompt)}
        self.with_twins.discard(name)
        if len(twins) > 1:
            self.with_twins |= twins
        self.arrived.append(name)
        if reuse == "fill":
            self.filling.add(name)
        self.answers[name] = []
        self.scheduler.add_request(request)

    @precondition(lambda self: self._pruned())
    @rule(pick=st.integers(0, 1000), count=st.integers(1, 4), most=st.integers(1, 70))
    def arrive_again(self, pick: int, count: int, most: int) -> None:
        """The same prompt and budget, as samples of one request and retries are."""
        pruned = self._pruned()
        script = self.worker.scripts[pruned[pick % len(pruned)]]
        length = len(script.prompt)
        (family,) = (i for i, f in enumerate(FAMILIES) if f[:length] == script.prompt)
        for _ in range(count):
            name, budget = f"r{self._count}", length - script.pruned_tokens
            self._arrive(name, family, length, max(budget, MINIMUM), most, False)

    @rule(
        family=st.sampled_from(range(len(FAMILIES))),
        length=st.integers(LONGEST // 2, LONGEST),
        budget=st.integers(MINIMUM, 120),
        steps=st.integers(1, 4),
    )
    def arrive_and_begin(
        self, family: int, length: int, budget: int, steps: int
    ) -> None:
        """A prompt that takes several steps to prune, and some of them."""
        self.arrive(family, length, budget, 5, False)
        for _ in range(steps):
            self._step()

    @precondition(lambda self: len(self.pending) < self.ahead)
    @rule()
    def schedule(self) -> None:
        """One step is scheduled, and executed before anything else is."""
        step = self.scheduler.schedule()
        self._poison_unowned()
        self.pending.append((step, self.worker.execute(step)))
        self._check_order()

    @precondition(lambda self: self.pending)
    @rule()
    def deliver(self) -> None:
        """The oldest step's output reaches the scheduler."""
        step, output = self.pending.popleft()
        for engine in self.scheduler.update_from_output(step, output).values():
            for part in engine.outputs:
                assert part.request_id not in self.ended, "an output after the end"
                self.answers[part.request_id] += part.new_token_ids
                if part.finish_reason is not None:
                    self.ended[part.request_id] = str(part.finish_reason)
                    self._check_report(part)

    @rule(steps=st.integers(1, 12))
    def go_on(self, steps: int) -> None:
        """Some steps at the scheduler's own pace."""
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        while len(self.pending) < self.ahead and self.scheduler.has_requests():
            self.schedule()
            self.books_agree()
        if self.pending:
            self.deliver()
            self.books_agree()

    @precondition(lambda self: self._live())
    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        live = self._live()
        self._abort(live[pick % len(live)])

    @precondition(lambda self: self._loading())
    @rule(pick=st.integers(0, 1000))
    def abort_while_its_prompt_is_pruned(self, pick: int) -> None:
        loading = self._loading()
        self._abort(loading[pick % len(loading)])

    @precondition(lambda self: self._loading())
    @rule(pick=st.integers(0, 1000), budget=st.one_of(st.none(), st.just(MINIMUM)))
    def retry_while_its_prompt_is_pruned(self, pick: int, budget: int | None) -> None:
        self._retry(self._loading(), pick, budget)

    @precondition(lambda self: self.arrived)
    @rule(pick=st.integers(0, 1000), budget=st.one_of(st.none(), st.just(MINIMUM)))
    def retry_under_the_same_name(self, pick: int, budget: int | None) -> None:
        """Whatever became of the first; steps that hold it may be in flight."""
        self._retry(self.arrived, pick, budget)

    def _retry(self, names: list[str], pick: int, budget: int | None) -> None:
        """A client hangs up, if its request has not ended, and asks at once again."""
        name = names[pick % len(names)]
        if name in self._live():
            self._abort(name)
        # What it was before is forgotten; nothing of it may show in the new answer.
        self.arrived.remove(name)
        self.aborted.discard(name)
        self.ended.pop(name, None)
        self.worker.forget(name)
        self._arrive(
            name, pick % len(FAMILIES), self.pool_tokens // 2, budget, 9, False
        )

    def _abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.aborted.add(name)

    @precondition(lambda self: self.scheduler.running and not self.pending)
    @rule(pick=st.integers(0, 1000))
    def preempt(self, pick: int) -> None:
        """Any running request, as a full pool would."""
        running = self.scheduler.running
        victim = running.pop(pick % len(running))
        self.scheduler._preempt_request(victim, 0.0)

    @rule()
    def reset_the_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    @precondition(lambda self: len(self.pending) < self.ahead)
    @rule()
    def reset_with_running_requests(self) -> None:
        """Also what a pause that clears caches does."""
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)

    @rule(pick=st.integers(0, 1000))
    def pause(self, pick: int) -> None:
        """Nothing moves, also where a client that leaves has the engine step."""
        while self.pending:
            self.deliver()
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        if pick % 2 and self._live():
            self.abort(pick)
        progress = self.worker.progress()
        answers = {name: list(tokens) for name, tokens in self.answers.items()}
        for _ in range(3):
            self._step()
        while self.pending:
            self.deliver()
        assert self.worker.progress().items() <= progress.items()
        assert self.answers == answers
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    # What must hold.

    @invariant()
    def books_agree(self) -> None:
        check_integrity(self.manager, idle=not self.scheduler.requests)
        for request in self.scheduler.requests.values():
            self.preemptions = max(self.preemptions, request.num_preemptions)

    def _pruned(self) -> list[str]:
        """Requests that may have twins."""
        scripts = [self.worker.scripts[name] for name in self.arrived]
        # One token may begin several families.
        return [
            script.name
            for script in scripts
            if script.pruned_tokens and not script.fails
        ]

    def _twins(self, prompt: list[int], pruned_tokens: int) -> list[Script]:
        return [
            script
            for script in self.worker.scripts.values()
            if (script.prompt, script.pruned_tokens) == (prompt, pruned_tokens)
        ]

    def _live(self) -> list[str]:
        gone = self.aborted | set(self.ended)
        return [name for name in self.arrived if name not in gone]

    def _loading(self) -> list[str]:
        waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
        requests = self.scheduler.requests
        return [name for name in self._live() if requests[name].status == waiting]

    def _state(self) -> list[str]:
        """What keeps each request, for a failure's message."""
        return [
            f"{name} {request.status.name} {request.num_computed_tokens} of "
            f"{request.num_tokens} tokens, {request.num_in_flight_tokens} in flight"
            for name, request in self.scheduler.requests.items()
        ]

    def _poison_unowned(self) -> None:
        """Blocks that are free and not in the prefix cache hold nothing of use."""
        self.worker.poison(
            [
                block.block_id
                for block in self.manager.block_pool.blocks
                if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
            ]
        )

    def _check_order(self) -> None:
        """Pruned prompts start first come, first served; the preempted come again.

        One that has a twin may wait for it, or begin when that comes to nothing; one
        whose prefix is filled waits for that.
        """
        alone = set(self.arrived) - self.with_twins - self.filling
        first = [n for n in dict.fromkeys(self.worker.admitted) if n in alone]
        assert first == sorted(first, key=self.arrived.index)
        started = set(first)
        last = self.arrived.index(first[-1]) if first else 0
        for name in self.arrived[:last]:
            script = self.worker.scripts[name]
            if script.pruned_tokens and name in alone - self.aborted:
                assert name in started, f"{first[-1]} overtook {name}"

    def _check_report(self, part: Any) -> None:
        pruned = self.worker.scripts[part.request_id].pruned_tokens
        report = part.kv_transfer_params
        if pruned and self.ended[part.request_id] == "length":
            assert report["pruned_tokens"] == pruned
            assert report["freed_blocks"] == pruned // BLOCK
            self.reused += report["reused_tokens"] > 0
            self.shared += report["shared_prefills"]
            self.filled += report["filled_tokens"] > 0

    def teardown(self) -> None:
        for _ in range(STEPS_TO_END):
            if not self.scheduler.has_requests() and not self.pending:
                break
            self._step()
        else:
            raise AssertionError(f"stuck: {self._state()}")
        check_integrity(self.manager, idle=True)
        assert self.worker.num_jobs == 0
        for name in self.arrived:
            script = self.worker.scripts[name]
            if name in self.aborted:
                assert self.answers[name] == script.answer[: len(self.answers[name])]
            elif script.fails:
                assert self.ended[name] == "error"
                assert self.answers[name] == []
            else:
                assert self.ended[name] == "length"
                assert self.answers[name] == script.answer
        SEEN.append(self.preemptions)
        REUSED.append(self.reused)
        SHARED.append(self.shared)
        FILLED.append(self.filled)


SEEN: list[int] = []
"""Preemptions of one request, at most, by example; the test below wants some."""
REUSED: list[int] = []
"""Requests that read a prefix, by example; the test below wants some."""
SHARED: list[int] = []
"""Requests that took a twin's prefill over, likewise."""
FILLED: list[int] = []
"""Requests whose prefix an ordinary request computed first, likewise."""


class AsyncMachine(Machine):
    """The next step is scheduled before the output of the one before is known."""

    kind = AsyncScheduler
    ahead = 2


class WindowMachine(Machine):
    """Layers with a sliding window are among the model's; none reads prefixes."""

    pool, sliding_window, fewer = POOL + 10, 50, 3


@pytest.mark.parametrize("machine", [Machine, AsyncMachine, WindowMachine])
def test_nothing_is_lost_shared_or_stuck(
    machine: type[Machine], caplog: pytest.LogCaptureFixture
) -> None:
    SEEN.clear()
    REUSED.clear()
    SHARED.clear()
    FILLED.clear()
    # Thousands of injected errors, each with a traceback.
    caplog.set_level(logging.CRITICAL, logger="asl_vllm.prefill.queue")
    examples = settings().max_examples // machine.fewer
    run_state_machine_as_test(machine, settings=settings(max_examples=examples))
    assert any(SEEN), "the pool was never full"
    reads = machine.sliding_window is None
    assert any(REUSED) == reads, "no prompt found a prefix, or one by mistake"
    assert any(SHARED) == reads, "no prompt was a twin's, or one by mistake"
    assert any(FILLED) == reads, "no prefix was filled, or one by mistake"
