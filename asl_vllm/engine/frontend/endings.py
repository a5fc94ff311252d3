"""However a request ends, its last output says what came of its prompt.

The engine core tells it with the first token (`asl_vllm.engine.scheduler.telling`). It
is kept here for the last output, which a front end may make itself: at a stop string,
or when a client aborts.

Touch point: wraps ``RequestState.make_request_output``, in every front end with a
policy, offline ones too.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine import FinishReason

from asl_vllm.engine.patching import wrap_method

USAGE_SLOT = "asl_vllm_usage"
"""Attribute of a request's state: where its HTTP request collects what it says."""

_TOLD = "asl_vllm_told"
_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION)


def install() -> None:
    """Wraps the method; idempotent."""
    from vllm.v1.engine.output_processor import RequestState

    wrap_method(
        RequestState,
        "make_request_output",
        (
            *("self", "new_token_ids", "pooling_output", "finish_reason"),
            *("stop_reason", "kv_transfer_params"),
        ),
        _wrap,
    )


def _wrap(original: Any) -> Any:
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        told = kv_transfer_params or getattr(self, _TOLD, None)
        if told is not None:
            setattr(self, _TOLD, told)
        slot = getattr(self, USAGE_SLOT, None)
        if slot is not None and finish_reason in _COMPLETE:
            slot.end(told)
        return original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            told if finish_reason is not None else None,
            *args,
            **kwargs,
        )

    return make_request_output
