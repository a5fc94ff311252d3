"""Asks every prompt of every cell once, and keeps each reply in a file of lines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.cells import FULL, Cell, cells
from benchmarks.accuracy.client import Client, Reply, Served, ServerError
from benchmarks.accuracy.controls import CONTROLS, shortened
from benchmarks.accuracy.fidelity import Fidelity, of_top
from benchmarks.accuracy.prompts import Prompt, PromptMaker
from benchmarks.accuracy.replies import Record, Replies
from benchmarks.accuracy.tasks import TASKS, Task

MOST_FAILURES = 20
"""Failed requests after which no more are sent."""


@dataclass(frozen=True)
class Plan:
    """What is asked of a server."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    policies: Sequence[str]
    budgets: Sequence[Fraction | int]
    n: int
    concurrency: int


@dataclass(frozen=True)
class _Job:
    task: Task
    length: int
    index: int
    cell: Cell
    prompt: Prompt


async def ask_all(
    client: Client,
    served: Served,
    maker: PromptMaker,
    tokenizer_bos: int | None,
    plan: Plan,
    replies: Replies,
) -> list[str]:
    """Asks whatever ``replies`` has not; returns what went wrong, a line each.

    Several requests are under way at once. One that fails is left out, so that the
    next run asks it again; after `MOST_FAILURES` it ends.
    """
    failures: list[str] = []
    for task in (TASKS[name] for name in plan.tasks):
        for length in plan.lengths:
            wanted = [
                (index, cell)
                for index in range(plan.n)
                for cell in cells(plan.policies, plan.budgets, length, served)
                if not replies.has(task.name, length, index, cell)
            ]
            if not wanted or len(failures) >= MOST_FAILURES:
                continue
            jobs = _jobs(maker, task, length, wanted)
            asking = _Asking(client, served, tokenizer_bos)
            bar = tqdm(total=len(wanted), desc=f"{task.name} {length}", leave=True)

            async def work(
                jobs: Iterator[_Job] = jobs,
                bar: tqdm[Any] = bar,
                asking: _Asking = asking,
            ) -> None:
                for job in jobs:
                    if len(failures) >= MOST_FAILURES:
                        return
                    try:
                        reply, sent = await asking.reply(job)
                        fidelity = await asking.fidelity(job, reply)
                    except ServerError as error:
                        failures.append(_failure(job, error))
                        bar.set_postfix(failed=len(failures))
                    else:
                        replies.add(
                            record(
                                *(job.task, job.length, job.index, job.cell),
                                *(job.prompt, reply, sent, served),
                                fidelity=fidelity,
                            )
                        )
                    bar.update()

            with bar:
                await asyncio.gather(*(work() for _ in range(plan.concurrency)))
    return failures


def _jobs(
    maker: PromptMaker, task: Task, length: int, wanted: Sequence[tuple[int, Cell]]
) -> Iterator[_Job]:
    """Each prompt is written once for all its cells, when it is needed."""
    last, prompt = -1, None
    for index, cell in wanted:
        if index != last or prompt is None:
            last, prompt = index, maker.prompt(task, length, index)
        yield _Job(task, length, index, cell, prompt)


class _Asking:
    """Sends the jobs of one task and length; keeps the unpruned answers it needs."""

    def __init__(self, client: Client, served: Served, bos: int | None) -> None:
        self._client, self._served, self._bos = client, served, bos
        self._own: dict[int, asyncio.Task[Reply]] = {}

    async def reply(self, job: _Job) -> tuple[Reply, int]:
        """The reply, and how many prompt tokens were sent."""
        cell, ids = job.cell, job.prompt.token_ids
        policy, budget = cell.policy, cell.budget
        if policy == FULL or policy in CONTROLS:
            policy, budget = "none", None
        if cell.policy in CONTROLS:
            place = (job.task.name, job.length, job.index)
            ids = shortened_prompt(ids, cell, self._served, self._bos, place)
        if job.task.own_answer:
            own = await self._own_answer(job)
            if cell.policy == FULL:
                return own, len(ids)
            forced, max_tokens = own.tokens, len(own.tokens)
        else:
            forced, max_tokens = (), job.task.max_tokens
        reply = await self._client.ask(
            self._served,
            ids,
            max_tokens=max_tokens,
            policy=policy,
            budget=budget,
            forced=forced,
        )
        return _counted(reply, len(ids)), len(ids)

    async def fidelity(self, job: _Job, reply: Reply) -> Fidelity | None:
        """How far the reply is from the unpruned one; None: the task has answers."""
        if not job.task.own_answer:
            return None
        return of_top((await self._own_answer(job)).top, reply.top)

    async def _own_answer(self, job: _Job) -> Reply:
        """The unpruned answer, asked for once a prompt."""
        if job.index not in self._own:
            self._own[job.index] = asyncio.create_task(self._ask_unpruned(job))
        return await self._own[job.index]

    async def _ask_unpruned(self, job: _Job) -> Reply:
        ids, size = job.prompt.token_ids, job.task.max_tokens
        reply = await self._client.ask(self._served, ids, max_tokens=size, top=True)
        return _counted(reply, len(ids))


def _counted(reply: Reply, sent: int) -> Reply:
    if reply.prompt_tokens != sent:
        raise ServerError(
            f"the server counts {reply.prompt_tokens} prompt tokens of {sent} sent"
        )
    return reply


def shortened_prompt(
    token_ids: list[int],
    cell: Cell,
    served: Served,
    bos: int | None,
    place: tuple[str, int, int],
) -> list[int]:
    """What a control sends of the prompt of this task, length and number."""
    assert cell.budget is not None
    task, length, index = place
    return shortened(
        cell.policy,
        token_ids,
        kept=served.kept(cell.budget, len(token_ids)),
        window=served.window,
        bos=bos,
        seed=f"{task} {length} {index} {cell.budget}",
    )


def record(
    task: Task,
    length: int,
    index: int,
    cell: Cell,
    prompt: Prompt,
    reply: Reply,
    sent: int,
    served: Served,
    fidelity: Fidelity | None = None,
) -> Record:
    """What is kept of a reply to ``sent`` tokens of prompt number ``index``.

    ``fidelity``: for a task without a right answer, whose score it is.
    """
    report = reply.kv_cache or {}
    return {
        "task": task.name,
        "length": length,
        "index": index,
        "policy": cell.label,
        "budget": cell.budget,
        "score": (
            task.score(reply.text, prompt.answers)
            if fidelity is None
            else fidelity.agreement
        ),
        **({} if fidelity is None else {"kl": fidelity.kl}),
        "text": reply.text,
        "answers": list(prompt.answers),
        "prompt_tokens": len(prompt.token_ids),
        "kept_tokens": report.get("kept_tokens", sent),
        "selection_layer": report.get("selection_layer"),
        "token_layers": token_layers(cell.policy, sent, report, served.num_layers),
        "num_layers": served.num_layers,
    }


def token_layers(
    policy: str, num_tokens: int, report: dict[str, Any], num_layers: int | None
) -> int | None:
    """Tokens times layers that a prompt's prefill computed; None if not known.

    Args:
        policy: Of the request.
        num_tokens: Tokens sent.
        report: ``usage.kv_cache`` of the reply.
        num_layers: Layers of the model.
    """
    if num_layers is None:
        return None
    if policy == "gemfilter" and report.get("selection_layer") is not None:
        # It starts over at layer 0, so it may compute more than a whole prefill, and
        # what it skipped is then reported as 0: docs/policies.md has the sum.
        layer, kept = int(report["selection_layer"]), int(report["kept_tokens"])
        return num_tokens * (layer + 1) + kept * num_layers
    return num_tokens * num_layers - int(report.get("skipped_token_layers", 0))


def _failure(job: _Job, error: ServerError) -> str:
    return f"{job.task.name} {job.length} {job.index} {job.cell.label}: {error}"
