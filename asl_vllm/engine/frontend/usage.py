"""``usage.kv_cache`` in replies: what was kept of the prompts of one HTTP request.

A front end opens a `RequestUsage` for each HTTP request (`collect`). Every sequence
that the request starts adds its part when it ends, and the usage objects that vLLM
makes after the last one carry the whole, in bodies and in streams alike.

Touch points: wraps ``OutputProcessor.add_request``, where a sequence is first seen in
its HTTP request's context; ``UsageInfo``, ``ResponseUsage`` and ``AnthropicUsage``. Its
result comes from `endings`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from pydantic import BaseModel

from asl_vllm.engine.frontend import endings
from asl_vllm.engine.patching import change, together, wrap_method
from asl_vllm.engine.result import untouched_usage

USAGE_FIELD = "kv_cache"
"""Name of the part of ``usage`` that is ours."""

_TOTALS = (
    *("kept_tokens", "pruned_tokens", "freed_blocks", "skipped_token_layers"),
    *("reused_tokens", "reused_token_layers", "rerun_token_layers"),
)
_COMMON = ("policy", "budget", "selection_layer")


class SequenceUsage:
    """One sequence's part: None until it has ended, and for good where it failed."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self.result: dict[str, Any] | None = None

    def end(self, result: dict[str, Any] | None) -> None:
        """Takes the engine's result; None says that no budget was in force."""
        self.result = result or untouched_usage(self._num_prompt_tokens)


class RequestUsage:
    """The sequences of one HTTP request: a prompt and a choice each."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._sequences: dict[tuple[int, int], SequenceUsage] = {}

    def prompt(self, request_id: str) -> int:
        """The prompt's place; prompts are counted in the order first named."""
        return self._prompts.setdefault(request_id, len(self._prompts))

    def sequence(
        self, request_id: str, index: int, num_prompt_tokens: int
    ) -> SequenceUsage:
        """A sequence begins: choice ``index`` of the prompt named ``request_id``."""
        sequence = SequenceUsage(num_prompt_tokens)
        self._sequences[self.prompt(request_id), index] = sequence
        return sequence

    def report(self) -> dict[str, Any] | None:
        """``usage.kv_cache``; None before the last sequence has ended.

        Counts are sums over the sequences; ``policy``, ``budget`` and
        ``selection_layer`` are null where they differ. Several sequences are listed
        in ``sequences`` too, in the order of the reply's choices.
        """
        results = [
            sequence.result for _, sequence in sorted(self._sequences.items(), key=_key)
        ]
        ended = [result for result in results if result is not None]
        if not ended or len(ended) < len(results):
            return None
        if len(ended) == 1:
            return dict(ended[0])
        first = ended[0]
        same = {name: all(r[name] == first[name] for r in ended) for name in _COMMON}
        return {
            **{name: first[name] if same[name] else None for name in _COMMON},
            **{name: sum(r[name] for r in ended) for name in _TOTALS},
            "sequences": ended,
        }


def _key(item: tuple[tuple[int, int], SequenceUsage]) -> tuple[int, int]:
    return item[0]


_current: ContextVar[RequestUsage | None] = ContextVar("asl_vllm_usage", default=None)


@contextmanager
def collect() -> Iterator[RequestUsage]:
    """Collects what the sequences started inside report; tasks inherit it."""
    usage = RequestUsage()
    token = _current.set(usage)
    try:
        yield usage
    finally:
        _current.reset(token)


def collecting() -> bool:
    """Whether an HTTP request is being answered whose usage is collected."""
    return _current.get() is not None


def name_prompt(request_id: str) -> bool:
    """Gives a prompt its place in the order of choices; whether usage is collected."""
    usage = _current.get()
    if usage is None:
        return False
    usage.prompt(request_id)
    return True


@together()
def install() -> None:
    """Wraps the touch points; idempotent. For front ends with a policy only."""
    from vllm.entrypoints.anthropic.protocol import AnthropicUsage
    from vllm.entrypoints.openai.responses.protocol import ResponseUsage
    from vllm.entrypoints.serve.engine.protocol import UsageInfo
    from vllm.v1.engine.output_processor import OutputProcessor

    wrap_method(
        OutputProcessor,
        "add_request",
        ("self", "request", "prompt", "parent_req", "request_index"),
        _wrap_add,
    )
    endings.install()
    change(partial(_allow_field, AnthropicUsage))
    for model in (UsageInfo, ResponseUsage, AnthropicUsage):
        wrap_method(model, "__init__", ("self", "data"), _wrap_usage)


def _allow_field(model: Any) -> None:
    """Lets a usage model have our field, as the others do; and what contains it."""
    if model.model_config.get("extra") == "allow":
        return
    model.model_config["extra"] = "allow"
    model.model_rebuild(force=True)
    for other in vars(sys.modules[model.__module__]).values():
        if isinstance(other, type(BaseModel)) and other.__module__ == model.__module__:
            other.model_rebuild(force=True)


def _wrap_add(original: Any) -> Any:
    def add_request(
        self: Any,
        request: Any,
        prompt: Any,
        parent_req: Any = None,
        request_index: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, request, prompt, parent_req, request_index, *args, **kwargs)
        usage = _current.get()
        if usage is not None and not request.resumable:
            state = self.request_states[request.request_id]
            slot = usage.sequence(
                request.external_req_id, request_index, state.prompt_len
            )
            setattr(state, endings.USAGE_SLOT, slot)

    return add_request


def _wrap_usage(original: Any) -> Any:
    def __init__(self: Any, **data: Any) -> None:
        original(self, **data)
        usage = _current.get()
        if usage is not None and (report := usage.report()) is not None:
            setattr(self, USAGE_FIELD, report)

    return __init__
