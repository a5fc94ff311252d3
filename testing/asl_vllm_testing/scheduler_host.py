"""vLLM's scheduler with our connector, and no engine around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu_worker import record_kv_cache_layout

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.frontend.admission import plan_request
from asl_vllm.engine.kv_spec import in_bands, prunable
from asl_vllm.engine.messages import StepOrders, StepReports
from asl_vllm.engine.plan import PrunePlan
from asl_vllm.engine.scheduler.state import engine_state
from asl_vllm.engine.settings import Settings, settings_of
from asl_vllm.prefill import Bands, PrefillReport
from asl_vllm_testing.moved import get_kv_cache_groups
from asl_vllm_testing.vllm_configs import engine_config

BLOCK = 32
LAYERS = 10
POOL = 30
PROMPT = 10 * BLOCK + 5
BUDGET = 100
KEPT = 69
"""The largest k of at most 100 for which N - k is whole blocks."""
REPORT = PrefillReport(3, 1000, 2000, 0.1)


def planned_request(
    settings: Settings,
    name: str,
    prompt: list[int],
    given: dict[str, Any],
    *,
    salt: str | None = None,
    **sampling: Any,
) -> tuple[Request, PrunePlan | None]:
    """As it comes to the scheduler, with the plan that these fields make, if any."""
    params = SamplingParams(**sampling)
    params.update_from_generation_config({}, None)
    plan = plan_request(settings, given, len(prompt))
    if plan:
        plan.send_with(params)
    request = Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=params,
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    return request, plan


@dataclass
class Host:
    """A scheduler and its clock; the model is played by the test."""

    scheduler: Scheduler
    step_tokens: int = 0
    outputs: list[Any] = field(default_factory=list)

    @property
    def connector(self) -> AslConnector:
        connector = self.scheduler.connector
        assert isinstance(connector, AslConnector)
        return connector

    @property
    def free(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(
        self,
        name: str,
        budget: int | None = BUDGET,
        tokens: int = PROMPT,
        shallow: str | None = None,
        salt: str | None = None,
        reuse: str | None = None,
        policy: str | None = None,
        **sampling: Any,
    ) -> Request:
        asked = {
            "kv_budget": budget,
            "kv_shallow": shallow,
            "kv_reuse": reuse,
            "kv_policy": policy,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        request, _ = planned_request(
            settings_of(self.scheduler.vllm_config),
            name,
            [7] * tokens,
            given,
            salt=salt,
            **{"max_tokens": 4, **sampling},
        )
        self.scheduler.add_request(request)
        return request

    def held(self, name: str) -> list[int]:
        """Blocks that a request holds in each band."""
        bands = self.scheduler.kv_cache_manager.get_block_ids(name)
        return [sum(block != 0 for block in ids) for ids in bands]

    def step(
        self,
        done: set[str] | None = None,
        failed: set[str] | None = None,
        report: PrefillReport = REPORT,
    ) -> tuple[SchedulerOutput, StepOrders]:
        """Schedules, and answers with a token for each request that gets one."""
        output = self.scheduler.schedule()
        orders = output.kv_connector_metadata
        assert isinstance(orders, StepOrders)
        self.answer(output, done, failed, report)
        return output, orders

    def answer(
        self,
        output: SchedulerOutput,
        done: set[str] | None = None,
        failed: set[str] | None = None,
        report: PrefillReport = REPORT,
    ) -> None:
        """Gives a token to each request that was scheduled one."""
        names = list(output.num_scheduled_tokens)
        reports = {name: report for name in (done or set()) - (failed or set())}
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[1] for _ in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(
                finished_recving=done,
                failed_recving=failed or set(),
                kv_connector_worker_meta=StepReports(reports) if reports else None,
            ),
        )
        (self.outputs,) = [
            list(engine.outputs)
            for engine in self.scheduler.update_from_output(output, result).values()
        ] or [[]]


def _ngram(drafts: int) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 2,
    }


def make_host(
    *,
    pool_blocks: int = POOL,
    scheduler_class: type[Scheduler] = Scheduler,
    step_tokens: int = 256,
    drafts: int = 0,
    sliding_window: int | None = None,
    engine: dict[str, Any] | None = None,
    **policy: Any,
) -> Host:
    """A scheduler without an engine, its pool of ``pool_blocks`` blocks.

    With ``drafts`` it schedules so many drafted tokens for each request in a step; with
    ``sliding_window`` every other layer has one.
    ``engine`` are more engine arguments, ``policy`` options of asl_vllm; prompts are
    all of one token, so requests read nothing unless ``reuse`` says so.
    """
    kinds = ["full_attention", "sliding_attention"] * (LAYERS // 2)
    windowed = {"sliding_window": sliding_window, "layer_types": kinds}
    config = engine_config(
        {"policy": "asl", "window": 8, "reuse": "none", **policy},
        hf_overrides=windowed if sliding_window else {},
        max_model_len=2048,
        block_size=BLOCK,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=8,
        **{"speculative_config": _ngram(drafts) if drafts else None, **(engine or {})},
    )
    # As vLLM has it where it chooses such a scheduler itself.
    config.scheduler_config.async_scheduling = issubclass(
        scheduler_class, AsyncScheduler
    )
    config.cache_config.num_gpu_blocks = pool_blocks
    record_kv_cache_layout(config.cache_config, "LBHNC")
    init_none_hash(sha256)
    sizes: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 2,
        "head_size": 32,
        "dtype": torch.float32,
    }
    names = [f"layers.{layer}" for layer in range(LAYERS)]
    specs: dict[str, KVCacheSpec] = dict.fromkeys(
        names, prunable(FullAttentionSpec(**sizes))
    )
    if sliding_window:
        window = prunable(SlidingWindowSpec(**sizes, sliding_window=sliding_window))
        specs.update(dict.fromkeys(names[1::2], window))
    specs = in_bands(specs, settings_of(config).bands, names)
    pool = KVCacheConfig(
        num_blocks=pool_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=get_kv_cache_groups(config, specs),
    )
    scheduler = scheduler_class(
        config, pool, structured_output_manager=Mock(), block_size=BLOCK, log_stats=True
    )
    return Host(scheduler, config.scheduler_config.max_num_batched_tokens)


def report_of(selection_layer: int | None, bands: int) -> PrefillReport:
    """What a prefill with ``kv_shallow`` "full" reports."""
    deep = 0
    if selection_layer is not None:
        deep = Bands(LAYERS, bands).below(selection_layer)
    return PrefillReport(selection_layer, 1, 2, 0.1, pruned_bands=deep)


FULL = -(-PROMPT // BLOCK)
"""Blocks of the prompt in a band that keeps every token."""
FREED = (PROMPT - KEPT) // BLOCK


def state_of(host: Host) -> dict[str, Any]:
    parallel = Mock(tensor_parallel_size=2)
    core: Any = Mock(scheduler=host.scheduler, engine_index=1)
    core.vllm_config.parallel_config = parallel
    return engine_state(core)


def states(host: Host) -> list[tuple[Any, ...]]:
    names = ("request_id", "state", "layer", "selection_layer", "blocks_held")
    return [tuple(r[n] for n in names) for r in state_of(host)["requests"]]
