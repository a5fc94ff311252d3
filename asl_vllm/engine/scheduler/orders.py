"""The connector's half in the scheduler: plans, admission, jobs, results."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from struct import pack
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import RequestStatus

from asl_vllm.engine.messages import StepOrders, StepReports
from asl_vllm.engine.plan import PrunePlan, plan_of
from asl_vllm.engine.result import prompt_result
from asl_vllm.engine.scheduler.bands import BandManagers
from asl_vllm.engine.scheduler.blocks import (
    PrunedBlocksManager,
    WindowBlocksManager,
    held_blocks,
)
from asl_vllm.engine.scheduler.fills import Fills
from asl_vllm.engine.scheduler.integrity import IdleCheck
from asl_vllm.engine.scheduler.lookup import PrefixLookup
from asl_vllm.engine.scheduler.metrics import PruningTally
from asl_vllm.engine.scheduler.stale_outputs import StaleOutputs
from asl_vllm.engine.scheduler.twins import Twins
from asl_vllm.engine.settings import settings_of
from asl_vllm.prefill import PrefillJob, PrefillProgress, PrefillReport

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

_STEPS_AHEAD = 2
"""Steps' worth of prompts that may hold blocks at once: one runs, one waits, so
that a step is never idle for want of a job."""


class SchedulerSide:
    """Owns the plans of requests with a budget and the list of running jobs."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        settings = settings_of(vllm_config)
        self._settings = settings
        self.num_layers = settings.num_layers
        self._step_tokens = settings.step_tokens
        self._pass_token_layers = settings.pass_token_layers
        self._plans: dict[str, PrunePlan] = {}
        self._reports: dict[str, PrefillReport] = {}
        self._progress: dict[str, PrefillProgress] = {}
        self.tally = PruningTally()
        self.stale_outputs = StaleOutputs()
        self._in_flight: dict[str, int] = {}
        self._dropped: set[str] = set()
        self._new_drops: set[str] = set()
        self._new_jobs: list[PrefillJob] = []
        self._untold: set[str] = set()
        self._twins = Twins(self.is_loading, self._is_whole)
        self._sharing: dict[str, str] = {}
        self.fills = Fills()
        self._turned_away = False
        self.paused = False

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Finds the block managers whose requests can be pruned."""
        self._idle_check = IdleCheck(kv_cache_manager)
        self._log_stats = kv_cache_manager.log_stats
        self.prefixes = PrefixLookup(self._settings, kv_cache_manager)
        self._groups = kv_cache_manager.coordinator.single_type_managers
        self._managers = [m for m in self._groups if isinstance(m, PrunedBlocksManager)]
        windows = [m for m in self._groups if m not in self._managers]
        assert all(isinstance(m, WindowBlocksManager) for m in windows), windows
        settings = self._settings
        self._bands = BandManagers(self._managers, settings.bands)
        assert {m.block_size for m in self._groups} == {settings.block_size}
        pool_blocks = kv_cache_manager.block_pool.num_gpu_blocks
        # The most that a request holds of windows; vLLM bounds it for them only.
        most = sum(m.max_admission_blocks_per_request or 0 for m in windows)
        blocks = settings.usable_blocks(pool_blocks - most)
        if windows:
            blocks //= len(self._managers)
        self.pool_tokens = blocks * settings.block_size
        if self.pool_tokens < settings.max_model_len:
            logger.info(
                "asl_vllm: the KV pool holds %d tokens; prompts of %d to %d tokens are "
                "answered with a kv_budget and refused without one",
                self.pool_tokens,
                self.pool_tokens + 1,
                settings.max_model_len,
            )

    def on_new_request(self, request: Request) -> None:
        """Takes a request's plan; one that will be pruned leaves the prefix cache."""
        self._idle_check.begin(request.request_id)
        self.stale_outputs.begin(request)
        plan = plan_of(request.sampling_params)
        if plan is None:
            return
        self._plans[request.request_id] = plan
        self._untold.add(request.request_id)
        if plan.pruned_blocks:
            self._bands.prune(request.request_id, plan)
            if self.prefixes.may_read(plan):
                self._twins.add(request, plan)
            self.prefixes.take_hashes(request, plan)

    def tokens_to_load(self, request: Request) -> tuple[int | None, bool]:
        """(N-1, True) for a pruned request, (0, False) for any other.

        (N-1, False) where a twin has them: the request runs in this very step.
        (None, False) while a twin is prefilled, or the prefix by an ordinary request.
        And while enough prompts hold blocks, or a dropped job of its name is not
        reported yet; then none of the pruned requests behind it is admitted in this
        step either, so that the order stays.
        """
        plan = self._plans.get(request.request_id)
        if plan is None or not plan.pruned_blocks:
            return 0, False
        request_id = request.request_id
        self._sharing.pop(request_id, None)
        for manager in self._managers:
            manager.withdraw(request_id)
        twin = self._twins.find(request_id)
        if twin is not None and request_id not in self._dropped:
            if self.is_loading(twin):
                return None, False
            self._sharing[request_id] = twin
            for manager in self._managers:
                manager.offer_twin(request_id, twin, plan.num_prompt_tokens - 1)
            return plan.num_prompt_tokens - 1, False
        if self._waits_for_fill(request, plan):
            return None, False
        busy = sum(self._in_flight.values()) >= _STEPS_AHEAD * self._step_tokens
        if busy or self._turned_away or request_id in self._dropped:
            self._turned_away = True
            return None, False
        if plan.absent_blocks < plan.pruned_blocks:
            # After a preemption the next prefill says which layers lack the others.
            self._bands.prune(request_id, plan)
        self.prefixes.offer(request, plan)
        return plan.num_prompt_tokens - 1, True

    def _waits_for_fill(self, request: Request, plan: PrunePlan) -> bool:
        """Whether an ordinary request puts the prefix into the cache first.

        Or will: not more prefixes at once than there is room for, or one would take
        another's place before that is read.
        """
        if plan.reuse != "fill" or not self.prefixes.may_read(plan):
            return False
        if self.fills.asked(request.request_id):
            return self.fills.waits(request.request_id)
        held = sum(
            held_blocks(manager, name)
            for manager in self._managers
            for name in self.fills.names
        )
        hashes, left = self.prefixes.worth_filling(request, plan, held)
        shared = self.fills.has(hashes)
        if not hashes or (left < 0 and not shared):
            return False
        if shared or left >= self.fills.promised_blocks * len(self._managers):
            self.fills.ask(request, hashes, len(hashes) * plan.block_size)
        return True

    def on_allocated(self, request: Request, blocks: KVCacheBlocks) -> None:
        """Makes the job of a request that just got its blocks, unless a twin has it."""
        plan = self._plans[request.request_id]
        self._twins.holds(request.request_id)
        self.fills.serve(request.request_id)
        if twin := self._sharing.pop(request.request_id, None):
            self._on_shared(request, plan, self._reports[twin])
            return
        held: list[list[int]] = []
        windows: list[tuple[int, list[int]]] = []
        for manager, ids in zip(self._groups, blocks.get_block_ids(), strict=True):
            if isinstance(manager, PrunedBlocksManager):
                held.append(ids[plan.absent_blocks :])
            else:
                skipped = next((i for i, block in enumerate(ids) if block), len(ids))
                windows.append((skipped, ids[skipped:]))
        if self._log_stats:
            # vLLM notes it when a request first runs, which is after its prefill.
            request.record_event(EngineCoreEventType.SCHEDULED)
        assert request.prompt_token_ids is not None
        reused = self.prefixes.pinned_ids(request.request_id)
        read = len(reused[0]) * plan.block_size if reused else 0
        if request.prefill_stats is not None:
            # To vLLM all but the last token came from outside; to clients, what did not
            # have to be computed for them came from its cache.
            found = read - min(read, self.fills.filled_tokens(request.request_id))
            request.prefill_stats.set(plan.num_prompt_tokens, found, 0)
        self._in_flight[request.request_id] = _computed_at_most(plan, read)
        self._new_jobs.append(
            PrefillJob(
                request_id=request.request_id,
                policy=plan.policy,
                prompt_token_ids=_packed(request.prompt_token_ids),
                pruned_blocks=plan.pruned_blocks,
                block_size=plan.block_size,
                block_ids=held,
                window_blocks=windows,
                keep_shallow=plan.keep_shallow,
                reused_block_ids=reused,
            )
        )

    def _on_shared(
        self, request: Request, plan: PrunePlan, report: PrefillReport
    ) -> None:
        """A request took its prompt over from a twin that reported this."""
        tokens = plan.num_prompt_tokens - 1
        if request.prefill_stats is not None:
            request.prefill_stats.set(plan.num_prompt_tokens, tokens, 0)
        again = request.request_id in self._reports
        own = self._reports[request.request_id] = report.as_shared(tokens)
        self._untold.add(request.request_id)
        if not again:
            self.tally.shared(plan, own)

    def _is_whole(self, request_id: str) -> bool:
        """Whether a request's pruned prompt is in the blocks that it holds."""
        reported = request_id in self._reports and not self.is_loading(request_id)
        return reported and all(m.req_to_blocks.get(request_id) for m in self._managers)

    def orders(self, num_scheduled_tokens: int) -> StepOrders:
        """This step's orders: passes get what is left, within ``pass_share``."""
        if self._settings.config.check_integrity:
            self._idle_check.run()
        jobs, self._new_jobs = self._new_jobs, []
        drops, self._new_drops = self._new_drops, set()
        self._turned_away = False
        left = max(self._step_tokens - num_scheduled_tokens, 0)
        token_layers = min(left * self.num_layers, self._pass_token_layers)
        return StepOrders(jobs, token_layers, drops, self.paused)

    def on_output(self, output: KVConnectorOutput) -> None:
        """Takes in which jobs ended and what they report.

        A dropped job is reported too, once, and as done where it was faster than the
        order; vLLM, which awaits no such load, is not to see that.
        """
        reports = output.kv_connector_worker_meta
        if reports is not None:
            assert isinstance(reports, StepReports)
            for request_id, report in reports.reports.items():
                if request_id in self._dropped:
                    continue
                if plan := self._plans.get(request_id):
                    again = request_id in self._reports
                    filled = self.fills.filled_tokens(request_id)
                    filled = min(filled, report.reused_tokens)
                    report = replace(report, filled_tokens=filled)
                    reuse = self.prefixes.outcome(plan, report)
                    self.tally.prefilled(plan, report, reuse, again=again)
                    self._reports[request_id] = report
                    self._untold.add(request_id)
                    self._bands.prune(request_id, plan, report)
            self._progress = reports.progress
        for request_id in output.finished_recving or ():
            self._in_flight.pop(request_id, None)
            if request_id not in self._dropped:
                self.prefixes.unpin(request_id)
        if output.finished_recving:
            late = self._dropped & output.finished_recving
            output.finished_recving = output.finished_recving - late
            self._dropped -= late
            self._new_drops -= late

    def is_loading(self, request_id: str) -> bool:
        """Whether a live request has a job that is not reported yet."""
        return request_id in self._in_flight and request_id not in self._dropped

    def prunes(self, request_id: str) -> bool:
        """Whether a request is alive and pruned."""
        plan = self._plans.get(request_id)
        return plan is not None and plan.pruned_blocks > 0

    def on_taken_back(self, request_id: str) -> None:
        """A request lost its blocks: its job, if it has one, is to be dropped."""
        if self.is_loading(request_id):
            self._dropped.add(request_id)
            self._new_drops.add(request_id)
            self._progress.pop(request_id, None)
            # Whoever gets them is told after the workers have dropped the job.
            self.prefixes.unpin(request_id)

    def on_finished(self, request: Request) -> dict[str, Any] | None:
        """Forgets a request and returns the part of its reply that is ours."""
        self._idle_check.end(request.request_id)
        self.stale_outputs.end(request)
        plan = self._plans.pop(request.request_id, None)
        report = self._reports.pop(request.request_id, None)
        self._untold.discard(request.request_id)
        self.on_taken_back(request.request_id)
        self.prefixes.forget(request.request_id)
        self._twins.forget(request.request_id)
        self.fills.forget(request.request_id)
        self._sharing.pop(request.request_id, None)
        for manager in self._managers:
            manager.forget(request.request_id)
        if plan is None:
            return None
        self.tally.ended(plan.policy, _outcome(request, plan))
        if plan.pruned_blocks and report is None:
            return None
        return asdict(prompt_result(plan, report))

    def tell(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Has the first output after a prefill say what came of it.

        A front end may end a request by itself, at a stop string, and is not told
        more then.
        """
        if not self._untold:
            return
        for output in outputs:
            request_id = output.request_id
            if request_id not in self._untold or not output.new_token_ids:
                continue
            plan, report = self._plans[request_id], self._reports.get(request_id)
            if report is not None or not plan.pruned_blocks:
                output.kv_transfer_params = asdict(prompt_result(plan, report))
                self._untold.discard(request_id)

    def pruned_requests(self) -> list[dict[str, Any]]:
        """The pruned requests that are alive, in order of arrival."""
        return [
            self._state_of(request_id, plan)
            for request_id, plan in self._plans.items()
            if plan.pruned_blocks
        ]

    def tokens_saved(self) -> int:
        """Tokens that requests would hold more if none were pruned; in all layers."""
        pruned = sum(
            manager.pruned_blocks(request_id)
            for manager in self._managers
            for request_id in self._plans
            if held_blocks(manager, request_id)
        )
        return pruned * self._settings.block_size // len(self._managers)

    def _state_of(self, request_id: str, plan: PrunePlan) -> dict[str, Any]:
        report = self._reports.get(request_id)
        progress = self._progress.get(request_id)
        held = sum(held_blocks(manager, request_id) for manager in self._groups)
        if self.is_loading(request_id):
            state = "prefilling" if progress else "waiting"
            layer = progress.layer if progress else 0
            selected = progress.selection_layer if progress else None
        elif report is not None and held:
            state, layer = "decoding", self.num_layers
            selected = report.selection_layer
        else:
            # Not yet admitted, or preempted and to be prefilled again.
            state, layer, selected = "waiting", 0, None
        return {
            "request_id": request_id,
            "policy": plan.policy,
            "budget": plan.budget,
            "num_prompt_tokens": plan.num_prompt_tokens,
            "kept_tokens": plan.kept_tokens,
            "state": state,
            "layer": layer,
            "num_layers": self.num_layers,
            "selection_layer": selected,
            "reused_tokens": self._reused_tokens(request_id, report),
            "blocks_held": held,
        }

    def _reused_tokens(self, request_id: str, report: PrefillReport | None) -> int:
        """Tokens of a request that come from the prefix cache, as far as is known."""
        if self.is_loading(request_id):
            pinned = self.prefixes.pinned_ids(request_id)
            return len(pinned[0]) * self._settings.block_size if pinned else 0
        return report.reused_tokens if report else 0


def _computed_at_most(plan: PrunePlan, read: int) -> int:
    """Tokens of a prompt that its prefill computes, of those it reads some again."""
    return plan.num_prompt_tokens - read + min(plan.kept_tokens, read)


def _packed(token_ids: Sequence[int]) -> array[int]:
    """Token ids as they are sent to workers: to pickle a list takes longer.

    By way of bytes, since an array reads a list number by number, in twice the time.
    """
    return array("i", pack(f"{len(token_ids)}i", *token_ids))


def _outcome(request: Request, plan: PrunePlan) -> str:
    if request.status == RequestStatus.FINISHED_ERROR:
        return "failed"
    if request.status == RequestStatus.FINISHED_ABORTED:
        # At a stop string a front end aborts too, once there is a token.
        params = request.sampling_params
        stopped = params is not None and params.stop and request.num_output_tokens
        if not stopped:
            return "aborted"
    return "pruned" if plan.pruned_blocks else "unpruned"
