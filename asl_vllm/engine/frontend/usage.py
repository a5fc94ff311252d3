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
from asl_vllm.engine.result import PromptResult, sum_of

USAGE_FIELD = "kv_cache"
"""Name of the part of ``usage`` that is ours."""


class SequenceUsage:
    """One sequence's part; it has not ended yet, or for good where it failed."""

    def __init__(self) -> None:
        self.ended = False
        self.result: PromptResult | None = None

    def end(self, told: dict[str, Any] | None) -> None:
        """Takes what the engine told; None says that it had no plan."""
        self.ended = True
        self.result = None if told is None else PromptResult(**told)


class RequestUsage:
    """The sequences of one HTTP request: a prompt and a choice each."""

    def __init__(self) -> None:
        self._sequences: list[SequenceUsage] = []

    def sequence(self) -> SequenceUsage:
        """A sequence begins."""
        self._sequences.append(SequenceUsage())
        return self._sequences[-1]

    def result(self) -> PromptResult | None:
        """What came of the prompts, of those with a plan.

        None before the last sequence has ended, and where there was no plan: such a
        reply is vLLM's, untouched.
        """
        results = [s.result for s in self._sequences if s.result is not None]
        if not results or not all(sequence.ended for sequence in self._sequences):
            return None
        return sum_of(results)


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
            setattr(state, endings.USAGE_SLOT, usage.sequence())

    return add_request


def _wrap_usage(original: Any) -> Any:
    def __init__(self: Any, **data: Any) -> None:
        original(self, **data)
        usage = _current.get()
        if usage is not None and (result := usage.result()) is not None:
            setattr(self, USAGE_FIELD, result.numbers())

    return __init__
