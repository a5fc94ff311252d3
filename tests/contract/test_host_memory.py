"""Our connector beside vLLM's offloading connector: who stores and loads what."""

from __future__ import annotations

import inspect
import random
from functools import partial
from typing import Any

import pytest
import vllm
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
)
from vllm.v1.kv_offload.cpu.gpu_worker import SingleDirectionOffloadingHandler
from vllm.v1.request import RequestStatus

from asl_vllm.engine.multi_connector import AslMultiConnector
from asl_vllm.engine.scheduler.integrity import check_integrity
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing.host_memory import host_memory
from asl_vllm_testing.pretend import VOCABULARY, PretendWorker, Script
from asl_vllm_testing.scheduler_host import BLOCK, make_host, planned_request

POOL = 20
DOCUMENT = [random.Random(1).randrange(VOCABULARY) for _ in range(15 * BLOCK)]
LONG = DOCUMENT[: 12 * BLOCK + 9]
OTHER = [(token + 1) % VOCABULARY for token in DOCUMENT]
BUDGET = 3 * BLOCK


class Server:
    """A scheduler with both connectors and a worker that checks what it reads."""

    def __init__(self, pool_blocks: int = POOL, **policy: Any) -> None:
        self.scheduler = make_host(
            pool_blocks=pool_blocks,
            engine={"kv_transfer_config": host_memory()},
            check_integrity=True,
            **policy,
        ).scheduler
        self.worker = PretendWorker(pool_blocks, BLOCK, host_memory=True)
        self.hits: dict[str, int] = {}
        self.answers: dict[str, list[int]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.stats: list[dict[str, Any]] = []

    @property
    def loading(self) -> set[str]:
        waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
        requests = self.scheduler.requests.values()
        return {r.request_id for r in requests if r.status == waiting}

    @property
    def connector(self) -> AslMultiConnector:
        connector = self.scheduler.connector
        assert isinstance(connector, AslMultiConnector)
        return connector

    def add(self, name: str, prompt: list[int], budget: int | None = None) -> None:
        given = {"kv_budget": budget} if budget else {}
        settings = settings_of(self.scheduler.vllm_config)
        request, plan = planned_request(
            settings, name, prompt, given, max_tokens=3, ignore_eos=True
        )
        pruned = plan.pruned_tokens if plan else 0
        self.worker.scripts[name] = Script(name, prompt, 3, pruned)
        self.scheduler.add_request(request)

    def step(self) -> None:
        step = self.scheduler.schedule()
        output = self.worker.execute(step)
        for engine in self.scheduler.update_from_output(step, output).values():
            if engine.scheduler_stats and engine.scheduler_stats.kv_connector_stats:
                self.stats.append(engine.scheduler_stats.kv_connector_stats)
            for part in engine.outputs:
                self.answers.setdefault(part.request_id, []).extend(part.new_token_ids)
                if part.kv_transfer_params is not None:
                    self.reports[part.request_id] = part.kv_transfer_params
                if part.prefill_stats is not None:
                    stats = part.prefill_stats
                    self.hits[part.request_id] = stats.num_external_cached_tokens
        idle = not self.scheduler.requests
        check_integrity(self.scheduler.kv_cache_manager, idle=idle)

    def run(self) -> None:
        """To the end of all requests, and of what is being stored."""
        for _ in range(200):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("stuck")

    def ask(self, name: str, prompt: list[int], budget: int | None = None) -> None:
        self.add(name, prompt, budget)
        self.run()
        assert self.answers[name] == self.worker.scripts[name].answer

    def forget(self) -> None:
        """Empties the pool's prefix cache; what is in host memory stays."""
        assert self.scheduler.reset_prefix_cache()


@pytest.fixture
def server() -> Server:
    return Server()


def test_an_unpruned_prompt_is_loaded_from_host_memory(server: Server) -> None:
    server.ask("first", LONG)
    assert server.hits["first"] == 0
    server.forget()
    server.ask("again", LONG)
    assert server.hits["again"] == 12 * BLOCK


def test_a_pruned_prompt_is_ours_alone(server: Server) -> None:
    """It neither loads what is stored of its prompt, nor stores what it keeps."""
    server.ask("first", LONG)
    server.forget()
    server.add("pruned", LONG, BUDGET)
    server.step()
    assert server.loading == {"pruned"}
    assert server.worker.admitted == ["pruned"]
    server.run()
    assert server.answers["pruned"] == server.worker.scripts["pruned"].answer
    assert server.hits["pruned"] == 0
    server.ask("again", LONG)
    assert server.hits["again"] == 12 * BLOCK
    server.ask("other", OTHER, BUDGET)
    server.ask("unpruned", OTHER)
    assert server.hits["unpruned"] == 0


def test_a_budget_that_keeps_all_is_as_none(server: Server) -> None:
    server.ask("first", LONG)
    server.forget()
    server.ask("kept", LONG, len(LONG))
    assert server.hits["kept"] == 12 * BLOCK
    assert server.worker.admitted == []


def test_what_pruned_prompts_overwrite_is_stored_before(server: Server) -> None:
    """A block may be somebody else's before the copy of it is made."""
    server.add("first", LONG)
    while server.scheduler.requests:
        server.step()
    # Its stores are still under way, and most of the pool was its own.
    server.forget()
    server.add("pruned", OTHER, 8 * BLOCK)
    server.add("pruned too", OTHER, 8 * BLOCK)
    server.run()
    server.forget()
    server.ask("again", LONG)
    assert server.hits["again"] == 12 * BLOCK


def test_a_pruned_prompt_reads_what_was_loaded() -> None:
    server = Server(reuse="read")
    server.ask("first", LONG)
    server.forget()
    server.ask("again", LONG)
    server.ask("pruned", LONG, BUDGET)
    assert server.reports["pruned"]["reused_tokens"] == 12 * BLOCK


def test_twins_share_a_prefill_of_what_was_loaded() -> None:
    """And nothing of theirs is stored: what host memory holds stays as it was."""
    server = Server(reuse="read")
    server.ask("first", LONG)
    server.forget()
    server.ask("again", LONG)
    server.add("one", LONG, BUDGET)
    server.add("two", LONG, BUDGET)
    server.run()
    assert server.worker.admitted == ["one"]
    for name, shared in (("one", 0), ("two", 1)):
        assert server.answers[name] == server.worker.scripts[name].answer
        assert server.reports[name]["shared_prefills"] == shared
    assert server.reports["one"]["reused_tokens"] == 12 * BLOCK
    assert server.reports["two"]["reused_tokens"] == len(LONG) - 1
    server.forget()
    server.ask("later", LONG)
    assert server.hits["later"] == 12 * BLOCK


@pytest.mark.parametrize("abort", ["pruned", "again"])
def test_aborted_while_both_load(server: Server, abort: str) -> None:
    server.ask("first", LONG)
    server.forget()
    server.add("again", LONG[: 4 * BLOCK])
    server.add("pruned", OTHER, BUDGET)
    server.step()
    assert server.loading == {"again", "pruned"}
    server.scheduler.finish_requests(abort, RequestStatus.FINISHED_ABORTED)
    server.run()
    (other,) = {"pruned", "again"} - {abort}
    assert server.answers[other] == server.worker.scripts[other].answer
    assert abort not in server.answers


def test_a_pruned_prompt_that_is_put_back(server: Server) -> None:
    server.add("pruned", LONG, BUDGET)
    server.step()
    assert server.scheduler.reset_prefix_cache(
        reset_running_requests=True, reset_connector=True
    )
    server.run()
    assert server.answers["pruned"] == server.worker.scripts["pruned"].answer


def test_vllms_own_would_ask_the_other_one_which_wants_hashes(server: Server) -> None:
    """Why `AslMultiConnector` asks ours alone for what it prunes."""
    server.add("pruned", LONG, BUDGET)
    request = server.scheduler.requests["pruned"]
    with pytest.raises(AssertionError):
        MultiConnector.get_num_new_matched_tokens(server.connector, request, 0)


def test_vllms_own_would_not_tell_the_other_one_of_new_blocks(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `AslMultiConnector` says which blocks pruned prompts take."""
    taken = server.connector._other.scheduler._current_batch_allocated_block_ids
    assert taken == set()
    told: list[set[int]] = []
    for method in (MultiConnector, AslMultiConnector):
        seen = method.update_state_after_alloc

        def update(self: Any, *args: Any, seen: Any = seen) -> None:
            seen(self, *args)
            told.append(set(self._other.scheduler._current_batch_allocated_block_ids))

        with monkeypatch.context() as patch:
            patch.setattr(AslMultiConnector, "update_state_after_alloc", update)
            server.add(method.__name__, LONG, BUDGET)
            server.step()
            server.run()
    stock, _, ours, _ = map(len, told)
    assert ours == 3
    # Since 0.33 vLLM says so itself.
    assert stock == (0 if vllm.__version__.startswith("0.32.") else 3)


def test_copies_wait_for_the_steps_before() -> None:
    """Why frees need not be deferred, as they are for a role that receives."""
    text = inspect.getsource(SingleDirectionOffloadingHandler.transfer_async)
    assert "stream.wait_stream(current_platform.current_stream())" in text


def test_statistics_of_both_are_sent_and_shown(server: Server) -> None:
    server.ask("first", LONG)
    server.ask("pruned", OTHER, BUDGET)
    config = server.scheduler.vllm_config
    logging = KVConnectorLogging(config.kv_transfer_config)
    for stats in server.stats:
        logging.observe(stats)
    assert logging.transfer_stats_accumulator is not None
    found = logging.transfer_stats_accumulator.to_dict()
    assert found.keys() == {"AslConnector", "OffloadingConnector"}
    registry = CollectorRegistry()
    kinds = (Gauge, Counter, Histogram)
    metrics = AslMultiConnector.build_prom_metrics(
        config,
        {kind: partial(kind, registry=registry) for kind in kinds},
        ["model_name", "engine"],
        {0: ["m", 0]},
    )
    metrics.observe(found, 0)
    values = {
        sample.name: sample.value
        for family in registry.collect()
        for sample in family.samples
    }
    assert values["vllm:asl_freed_blocks_total"] == 12
    assert values["vllm:kv_offload_cpu_allocation_size_count"] > 0
