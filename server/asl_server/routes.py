"""``GET /v1/kv/policies`` and ``GET /v1/kv/stats``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from asl_server.schema import EngineState, Error, Policies, Stats, Totals
from asl_vllm._version import __version__
from asl_vllm.config import POLICY_NAMES
from asl_vllm.engine.frontend.engines import engine_states
from asl_vllm.engine.settings import settings_of

PATIENCE = 10.0
"""Seconds that a route waits for an engine, which answers between two steps."""

router = APIRouter(tags=["KV cache"])
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": Error, "description": "The engine is gone or does not answer."}
}


@router.get("/v1/kv/policies", responses=_UNAVAILABLE)
async def policies(request: Request) -> Policies:
    """What pruning this server offers: policies, defaults, limits, costs."""
    state = request.app.state
    engine = (await engine_states(state.engine_client, PATIENCE))[0]
    settings = settings_of(state.vllm_config)
    config = settings.config
    return Policies(
        policy=config.policy,
        policies=list(POLICY_NAMES),
        default_budget=config.budget,
        minimum_budget=settings.minimum_budget,
        block_size=settings.block_size,
        window=config.window,
        max_prompt_tokens=settings.prefill_capacity,
        num_layers=settings.num_layers,
        kv_bytes_per_token=engine["kv_bytes_per_token"],
        pool_tokens=engine["pool_tokens"],
        config=settings.resolved_options(),
        model=state.openai_serving_models.model_name(),
        version=__version__,
    )


@router.get("/v1/kv/stats", responses=_UNAVAILABLE)
async def stats(request: Request) -> Stats:
    """The KV pools now, the pruned requests in flight with their progress, totals."""
    engines = await engine_states(request.app.state.engine_client, PATIENCE)
    totals = [engine["totals"] for engine in engines]
    return Stats(
        engines=[EngineState.model_validate(engine) for engine in engines],
        totals=Totals(**{key: sum(t[key] for t in totals) for key in totals[0]}),
    )
