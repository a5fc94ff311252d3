"""JSON that the routes of asl_vllm return."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Policies(BaseModel):
    """What pruning this server offers."""

    policy: str = Field(description="The server's policy.", examples=["asl"])
    policies: list[str] = Field(description="What kv_policy may be.")
    default_budget: int | float | None = Field(
        description="kv_budget of requests that name none; null prunes nothing."
    )
    minimum_budget: int = Field(description="Smallest budget in tokens, per layer.")
    block_size: int = Field(description="Tokens of a KV block.")
    window: int = Field(description="Last prompt tokens, which are always kept.")
    max_prompt_tokens: int = Field(description="Longest prompt that can be pruned.")
    num_layers: int = Field(description="Layers of the model.")
    kv_bytes_per_token: int = Field(
        description="Bytes of one token's keys and values, all layers and ranks."
    )
    pool_tokens: int = Field(description="Tokens that one engine's KV pool holds.")
    config: dict[str, Any] = Field(description="Every option, as it is in force.")
    model: str = Field(description="Name under which the model is served.")
    version: str = Field(description="Version of asl_vllm.")


class Pool(BaseModel):
    """An engine's KV pool now."""

    block_size: int
    blocks_total: int
    blocks_used: int
    blocks_free: int
    blocks_pinned: int = Field(
        description="Blocks of the prefix cache that prefills are reading."
    )
    tokens_saved: int = Field(
        description="Tokens that requests now alive would hold more, per layer, were "
        "they not pruned."
    )
    usage: float = Field(ge=0, le=1)


class PrunedRequest(BaseModel):
    """A pruned request that is alive."""

    request_id: str
    policy: str
    budget: int | float
    num_prompt_tokens: int
    kept_tokens: int
    state: Literal["waiting", "prefilling", "decoding"]
    layer: int = Field(description="Layer that runs next; num_layers when done.")
    num_layers: int
    selection_layer: int | None = Field(description="null until it is found.")
    reused_tokens: int = Field(
        description="Tokens that its prefill reads, or read, from the prefix cache."
    )
    blocks_held: int


class EngineState(BaseModel):
    """One engine: its pool and its pruned requests."""

    index: int = Field(description="Data-parallel index of the engine.")
    pool: Pool
    requests: list[PrunedRequest]


class Totals(BaseModel):
    """Counts of all engines since they started."""

    requests: int = Field(description="Requests that were pruned.")
    pruned_tokens: int
    skipped_token_layers: int
    computed_token_layers: int
    reused_tokens: int = Field(
        description="Prompt tokens that prefills read from the prefix cache."
    )
    filled_tokens: int = Field(
        description="Of these, tokens that an ordinary prefill put there first."
    )
    shared_prefills: int = Field(
        description="Requests that took over another's prefill."
    )


class Stats(BaseModel):
    """The engines now."""

    engines: list[EngineState]
    totals: Totals


class ErrorInfo(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: int


class Error(BaseModel):
    """A reply that says why there is no other."""

    error: ErrorInfo
