"""A worker without a model: it writes marks into slots, and reads them back.

The mark of a token says what must be in its slot: for a request that is not pruned,
a hash of the tokens up to it, so that requests may share prefixes; for a pruned one
one that no other number of pruned tokens has, so that only twins may share. Every step
reads all that attention would read, so a slot that another request wrote to, or that
was never written, is found at once. The next token is a hash of the last mark, so each
answer is known beforehand.

With a sliding window there are two groups of layers with blocks of their own; of the
second one only what the window sees is read, and a prefill writes no more.

Steps are executed in the order in which they were scheduled, as a device does, also
where their outputs are looked at later. With ``host_memory`` vLLM's offloading
connector moves marks between blocks and host memory beside ours.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiKVConnectorMetadata,
    MultiKVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from asl_vllm.engine.messages import StepOrders
from asl_vllm.engine.worker.runner import WorkerSide
from asl_vllm.prefill import PrefillJob, PrefillProgress, PrefillQueue, PrefillReport
from asl_vllm_testing.host_memory import CHUNKS, HostMemoryWorker

VOCABULARY = 50
LAYERS = 10
"""As the model of the configuration: long prompts take several steps."""
STALE = -1
"""What a slot holds that nobody owns."""


@dataclass
class Script:
    """What will become of a request: known when it arrives."""

    name: str
    prompt: list[int]
    max_tokens: int
    pruned_tokens: int = 0
    fails: bool = False
    marks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        mark = zlib.crc32(f"{self.pruned_tokens}".encode()) if self.pruned_tokens else 1
        for position in range(len(self.prompt) + self.max_tokens):
            if position < len(self.prompt):
                token = self.prompt[position]
            else:
                token = mark % VOCABULARY
            self.tokens.append(token)
            mark = (mark * 1_000_003 + token + 1) % (1 << 61)
            self.marks.append(mark)

    @property
    def pruned_prompt(self) -> tuple[list[int], int]:
        """What twins have in common."""
        return self.prompt, self.pruned_tokens

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def expected(self, start: int, end: int) -> np.ndarray:
        return np.array(self.marks[start:end], dtype=np.int64)


class PretendPrefill:
    """A `Prefill` that writes the marks of a prompt again in each pass."""

    def __init__(
        self,
        job: PrefillJob,
        script: Script,
        slots: np.ndarray,
        sliding_window: int | None,
    ) -> None:
        assert list(job.prompt_token_ids) == script.prompt
        assert job.pruned_tokens == script.pruned_tokens
        self.job = job
        self.computed_token_layers = 0
        self._script = script
        self._slots = slots
        self._target = job.slots()[0].numpy()
        self._newest = self._target[:0]
        if sliding_window:
            (row,) = job.window_slots()
            self._newest = row.numpy()[-(sliding_window - 1) :]
            assert len(self._newest) >= min(sliding_window, len(script.prompt)) - 1
        self._whole = LAYERS * (job.num_prompt_tokens - job.reused_tokens)
        (reused,) = job.reused_block_ids or ([],)
        size = job.block_size
        self._read = np.array(reused, dtype=np.int64)[:, None] * size + np.arange(size)
        # What anybody who is not pruned writes there for these tokens.
        unpruned = Script("", script.prompt[: job.reused_tokens], 0)
        self._prefix = unpruned.expected(0, job.reused_tokens)

    @property
    def done(self) -> bool:
        return self.computed_token_layers >= self._whole

    @property
    def progress(self) -> PrefillProgress:
        return PrefillProgress(self.computed_token_layers * LAYERS // self._whole, None)

    @property
    def next_cost(self) -> int:
        return 1

    def advance(self, token_layers: int) -> int:
        read = self._slots[self._read.flatten()]
        assert (read == self._prefix).all(), f"{self.job.request_id}: a pin changed"
        spent = max(1, min(token_layers, self._whole - self.computed_token_layers))
        self.computed_token_layers += spent
        if self._script.fails and 2 * self.computed_token_layers >= self._whole:
            self._slots[self._target[::2]] = 13
            raise RuntimeError("injected")
        script = self._script
        self._slots[self._target] = script.expected(
            script.pruned_tokens, len(script.prompt) - 1
        )
        last = len(script.prompt) - 1
        self._slots[self._newest] = script.expected(last - len(self._newest), last)
        return spent

    def report(self) -> PrefillReport:
        reused = self.job.reused_tokens
        return PrefillReport(1, self._whole, self._whole, 0.0, reused_tokens=reused)


class PretendWorker:
    """Executes what a scheduler says, over the slots of one layer."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        host_memory: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        self.slots = np.full(num_blocks * block_size, STALE, dtype=np.int64)
        self._mover: OffloadingConnectorWorker | None = None
        if host_memory:
            pool = torch.from_numpy(self.slots).view(num_blocks, block_size)
            spec: Any = Mock(replicated_layout=False)
            self._mover = OffloadingConnectorWorker(spec, Mock(), Mock())
            self._mover.worker = HostMemoryWorker([pool], [[0]], CHUNKS)
        self.scripts: dict[str, Script] = {}
        self.admitted: list[str] = []
        self.copies = 0
        self._block_size = block_size
        self._sliding_window = sliding_window
        self._rows: dict[str, list[list[int]]] = {}
        self._known: dict[str, int] = {}
        self._side = WorkerSide()
        self._side.queue = PrefillQueue(self._start)  # type: ignore[arg-type]

    @property
    def num_jobs(self) -> int:
        assert self._side.queue is not None
        return len(self._side.queue)

    def _start(self, job: PrefillJob) -> PretendPrefill:
        script = self.scripts[job.request_id]
        return PretendPrefill(job, script, self.slots, self._sliding_window)

    def progress(self) -> dict[str, PrefillProgress]:
        """How far the running job is, by request."""
        assert self._side.queue is not None
        return self._side.queue.progress()

    def forget(self, name: str) -> None:
        """Another request of that name will come."""
        self.admitted = [other for other in self.admitted if other != name]
        self._known.pop(name, None)

    def poison(self, block_ids: list[int]) -> None:
        """Overwrites blocks that nobody owns."""
        for block_id in block_ids:
            first = block_id * self._block_size
            self.slots[first : first + self._block_size] = STALE

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        orders: Any = step.kv_connector_metadata
        moves: Any = None
        if self._mover is not None:
            assert isinstance(orders, MultiKVConnectorMetadata)
            orders, moves = orders.metadata
            self._mover.handle_preemptions(moves)
        self._update_rows(step)
        for copy in step.kv_cache_block_copies or ():
            source, target = (
                slice(block * self._block_size, (block + 1) * self._block_size)
                for block in (copy.src_block_id, copy.dst_block_id)
            )
            self.slots[target] = self.slots[source]
            self.copies += 1
        names = list(step.num_scheduled_tokens)
        sampled = [self._forward(name, step) for name in names]
        assert isinstance(orders, StepOrders)
        self.admitted += [job.request_id for job in orders.jobs]
        self._side.run(orders)
        results = self._side.take_results()
        reports: Any = self._side.take_reports()
        if self._mover is not None:
            self._mover.start_kv_transfers(moves)
            self._mover.prepare_store_kv(moves)
            results.finished_recving |= self._mover.get_finished(set())[1]
            moved = self._mover.build_connector_worker_meta()
            reports = MultiKVConnectorWorkerMetadata((reports, moved))
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving or set(),
                kv_connector_worker_meta=reports,
            ),
        )

    def _update_rows(self, step: SchedulerOutput) -> None:
        self._computed: dict[str, int] = {}
        for new in step.scheduled_new_reqs:
            if new.req_id not in self.scripts:
                # Nobody's: it fills the prefix cache for a pruned one.
                prompt = list(new.prompt_token_ids or ())
                self.scripts[new.req_id] = Script(new.req_id, prompt, 1)
            self._rows[new.req_id] = [list(row) for row in new.block_ids]
            self._computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for name, blocks, computed, generated in zip(
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            cached.num_output_tokens,
            strict=True,
        ):
            before = self._rows[name]
            if name in cached.resumed_req_ids:
                before = [[] for _ in before]
                # A reset throws away tokens that were sampled in a step under way.
                self._known[name] = len(self.scripts[name].prompt) + generated
            added = blocks if blocks is not None else [[] for _ in before]
            self._rows[name] = [
                [*row, *more] for row, more in zip(before, added, strict=True)
            ]
            self._computed[name] = computed

    def _forward(self, name: str, step: SchedulerOutput) -> list[int]:
        script, size = self.scripts[name], self._block_size
        start = self._computed[name]
        end = start + step.num_scheduled_tokens[name]
        rows = [np.array(row) for row in self._rows[name]]
        row, pruned = rows[0], script.pruned_tokens
        assert not row[: pruned // size].any(), f"{name}: pruned blocks are not null"
        assert row[pruned // size :].all(), f"{name}: null block beyond the pruned ones"
        self._attend(name, row, pruned, start, end)
        if self._sliding_window:
            # From what the first of them sees.
            seen = max(0, start - self._sliding_window + 1)
            assert rows[1][seen // size :].all(), f"{name}: null block in its window"
            self._attend(name, rows[1], seen, start, end)
        # Of a resumed request the generated tokens are prefilled again, in chunks.
        known = self._known.setdefault(name, len(script.prompt))
        if end < known:
            return []
        self._known[name] = known + 1
        return [script.tokens[known]]

    def _attend(
        self, name: str, row: np.ndarray, first: int, start: int, end: int
    ) -> None:
        """Writes positions ``start`` to ``end`` of a row, and reads from ``first``."""
        script, size = self.scripts[name], self._block_size
        positions = np.arange(first, end)
        slots = row[positions // size] * size + positions % size
        self.slots[slots[start - first :]] = script.expected(start, end)
        read = self.slots[slots]
        wrong = positions[read != script.expected(first, end)]
        assert not len(wrong), f"{name} reads other tokens at positions {wrong[:9]}"
