"""Every way to ask a server to generate, and where our fields are read there.

One table: the code adds the fields by it, and refuses them by it where they are not
read; docs/limits.md shows it (`scripts/endpoint_table.py`).

Touch points: the request models that it names, the handlers of the endpoints that read
no field, and ``AnthropicServingMessages._build_base_request``, which makes a chat
request of a message's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from pydantic import AfterValidator, BeforeValidator, Field, WrapValidator
from pydantic.fields import FieldInfo
from vllm.utils.import_utils import resolve_obj_by_qualname

from asl_vllm.engine.frontend.admission import refuse
from asl_vllm.engine.frontend.fields import FIELDS, NAMES
from asl_vllm.engine.frontend.places import (
    IN_PARAMETERS,
    LEAVE_OUT,
    as_sent,
    looks_misplaced,
    path_to_ours,
    refuse_misplaced,
)
from asl_vllm.engine.frontend.served import pruning
from asl_vllm.engine.patching import (
    UpstreamDriftError,
    change,
    together,
    wrap_method,
)
from asl_vllm.selection.budget import shown

BODY = "body or `vllm_xargs`"
PARAMETERS = "`sampling_params.extra_args`"
NOWHERE = "nowhere: refused"
WHOLE_PROOF = "`usage.kv_cache`, `X-KV-*`, `kv_transfer_params`"


@dataclass(frozen=True)
class Api:
    """A path, or several of a kind; ``model`` is the pydantic model of its body."""

    path: str
    model: str | None
    reads: str
    """Where our fields are read, for the document; what the code does goes by it."""
    proof: str
    handler: tuple[str, str] | None = None
    """The class and its method that refuses what is in no place to be read, where no
    model does."""


APIS: tuple[Api, ...] = (
    Api(
        "/v1/completions",
        "vllm.entrypoints.openai.completion.protocol.CompletionRequest",
        BODY,
        WHOLE_PROOF,
    ),
    Api(
        "/v1/chat/completions",
        "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",
        BODY,
        WHOLE_PROOF,
    ),
    Api(
        "/v1/chat/completions/batch",
        "vllm.entrypoints.openai.chat_completion.protocol.BatchChatCompletionRequest",
        BODY,
        "`usage.kv_cache` (summed), `X-KV-*`",
    ),
    Api(
        "/v1/responses",
        "vllm.entrypoints.openai.responses.protocol.ResponsesRequest",
        BODY,
        "`usage.kv_cache`, `X-KV-*`",
    ),
    Api(
        "/v1/messages",
        "vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest",
        BODY,
        "`usage.kv_cache`, `X-KV-*`",
    ),
    Api(
        "/v1/completions/render, /v1/chat/completions/render, /v1/responses/render, "
        "/v1/messages/render",
        None,
        f"{BODY}, for {PARAMETERS}",
        "none",
    ),
    Api(
        "/inference/v1/generate",
        "vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateRequest",
        PARAMETERS,
        "`X-KV-*`, `kv_transfer_params`",
        (
            "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens",
            "serve_tokens",
        ),
    ),
    Api("/invocations", None, "as the endpoint of the body", "as there"),
    Api(
        "/generative_scoring",
        "vllm.entrypoints.generate.generative_scoring.serving.GenerativeScoringRequest",
        NOWHERE,
        "`X-KV-*`",
        (
            "vllm.entrypoints.generate.generative_scoring.serving"
            ".ServingGenerativeScoring",
            "create_generative_scoring",
        ),
    ),
    Api(
        "/v1/systemone",
        "vllm.entrypoints.generate.structured_decisions.protocol"
        ".StructuredDecisionRequest",
        NOWHERE,
        "`X-KV-*`",
        (
            "vllm.entrypoints.generate.structured_decisions.serving"
            ".ServingStructuredDecisions",
            "create_decision",
        ),
    ),
    # Nothing of it is touched: its own model refuses fields that it does not know.
    Api("/v1/decisions", None, NOWHERE, "`X-KV-*`"),
    Api(
        "`vllm run-batch`",
        None,
        "each line, as the endpoint of its `url`",
        "`usage.kv_cache`",
    ),
    Api(
        "`LLM` and `AsyncLLM` in Python",
        None,
        "`SamplingParams.extra_args`",
        "`kv_transfer_params`",
    ),
    Api(
        "gRPC (`--grpc`)",
        None,
        "nowhere",
        "none",
    ),
)
"""In the order of the document."""


def declare() -> None:
    """Adds our fields to the request models, to be read or to be refused; idempotent.

    For every process, before vLLM makes its routes of the models.
    """
    for api in APIS:
        if api.model is not None and api.reads in (BODY, PARAMETERS):
            _declare(_named(api.model), read=api.reads == BODY)


@together()
def install() -> None:
    """Wraps what makes or takes requests behind the routes; idempotent.

    For front ends, once vLLM has made its routes.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    wrap_method(
        AnthropicServingMessages,
        "_build_base_request",
        ("cls", "anthropic_request", "openai_messages"),
        _wrap_base_request,
    )
    for api in APIS:
        if api.handler is not None:
            owner, name = api.handler
            parameters = ("self", "request", "raw_request")
            remedy = IN_PARAMETERS if api.reads == PARAMETERS else LEAVE_OUT
            wrap_method(_named(owner), name, parameters, partial(_wrap_handler, remedy))


def table() -> str:
    """The endpoints as a Markdown table; neighbours of one kind share a row."""
    rows = ["| Endpoint | `kv_*` fields read in | Proof |", "|---|---|---|"]
    for (reads, proof), alike in groupby(APIS, lambda api: (api.reads, api.proof)):
        paths = ", ".join(
            f"`{path}`" if path.startswith("/") else path
            for api in alike
            for path in api.path.split(", ")
        )
        rows.append(f"| {paths} | {reads} | {proof} |")
    return "\n".join(rows)


def _named(name: str) -> Any:
    """What vLLM has under a dotted name."""
    try:
        return resolve_obj_by_qualname(name)
    except AttributeError as error:
        raise UpstreamDriftError(f"vLLM lacks a name: {error}.") from error


def _declare(model: type, *, read: bool) -> None:
    fields = model.model_fields  # type: ignore[attr-defined]

    def declare() -> None:
        missing = [field for field in FIELDS if field.name not in fields]
        if missing:
            # So that misplaced ones are seen, where vLLM drops what it does not know.
            config = model.model_config  # type: ignore[attr-defined]
            config["extra"] = config.get("extra", "allow")
            if "vllm_xargs" in fields:
                fields["vllm_xargs"].metadata.append(WrapValidator(as_sent))
            if "sampling_params" in fields:
                before = BeforeValidator(_refuse_in_parameters)
                fields["sampling_params"].metadata.append(before)
        for field in missing:
            info: FieldInfo = Field(  # type: ignore[assignment]
                default=None,
                description=field.description
                if read
                else f"Read in {PARAMETERS} only.",
                json_schema_extra=field.schema,
            )
            # Any, so that one validation judges values as they were sent.
            info.annotation = Any
            if not read:
                info.metadata = [AfterValidator(partial(_refuse_in_body, field.name))]
            fields[field.name] = info
            model.__annotations__[field.name] = Any
        if missing:
            model.model_rebuild(force=True)  # type: ignore[attr-defined]

    change(declare)


def _refuse_in_body(name: str, value: Any) -> Any:
    if value is None:
        return None
    raise ValueError(
        f"{name} is not read in the body here; got {shown(value)}. {IN_PARAMETERS}"
    )


def _refuse_in_parameters(value: Any) -> Any:
    """Names that vLLM's parameters do not have would be dropped."""
    known = {"extra_args": None}
    path = path_to_ours({**value, **known} if isinstance(value, dict) else value)
    if path and pruning():
        raise ValueError(
            f"{path[-1]} is not read in {'.'.join(['sampling_params', *path[:-1]])}. "
            f"{IN_PARAMETERS}"
        )
    return value


def _wrap_base_request(original: Any) -> Any:
    def _build_base_request(
        cls: type, anthropic_request: Any, openai_messages: Any
    ) -> Any:
        chat = original(cls, anthropic_request, openai_messages)
        extra = anthropic_request.model_extra or {}
        for name in (*NAMES, *(name for name in extra if looks_misplaced(name))):
            value = getattr(anthropic_request, name, None)
            if value is not None:
                setattr(chat, name, value)
        return chat

    return _build_base_request


def _wrap_handler(remedy: str, original: Any) -> Any:
    async def handler(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        extra = request.model_extra or {}
        for name in NAMES:
            if extra.get(name) is not None:
                raise refuse(
                    f"{name} is not read here. {remedy}", shown(extra[name]), name
                )
        if pruning():
            refuse_misplaced(extra, remedy)
        return await original(self, request, *args, **kwargs)

    return handler
