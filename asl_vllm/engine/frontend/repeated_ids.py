"""A request id that is used again gets vLLM's random suffix inside the engine.

By default every id gets one. Without them (``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION``)
vLLM takes a second request for more input of the first, and its engine ends with
"duplicate request id"; where the first was hung up, tokens that were on their way to it
reach the second. So an id goes in as it is once.

Touch point: wraps ``InputProcessor.assign_request_id``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asl_vllm.engine.patching import wrap_method

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

_REMEMBERED = 100_000
"""Ids; so many requests later nothing of the first one is left."""

_used: dict[str, None] = {}
_others = False


def share(num_api_processes: int) -> None:
    """How many front ends one engine has: with others no id is known to be new."""
    global _others
    _others = num_api_processes > 1


def install() -> None:
    """Wraps the touch point; idempotent. For front ends with a policy only."""
    from vllm.utils import random_uuid
    from vllm.v1.engine.input_processor import InputProcessor

    def wrap(original: Any) -> Any:
        def assign_request_id(request: EngineCoreRequest) -> None:
            original(request)
            name = request.request_id
            if name != request.external_req_id:
                return
            if _others or name in _used:
                request.request_id = f"{name}-{random_uuid():.8}"
            _used[name] = None
            if len(_used) > _REMEMBERED:
                del _used[next(iter(_used))]

        return assign_request_id

    wrap_method(InputProcessor, "assign_request_id", ("request",), wrap)
