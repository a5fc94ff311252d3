"""A rendered prompt that was validated before its turn, with what came of that."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

_SAME = (
    "arrival_time",
    "lora_request",
    "tokenization_kwargs",
    "priority",
    "data_parallel_rank",
    "resumable",
    "session_id",
    "kv_hints",
)
"""Arguments of ``process_inputs`` that its result depends on, beside the first ones."""


class CheckedPrompt(dict[str, Any]):
    """A rendered prompt, which is a dict, and the request that was made of it.

    ``process_inputs`` takes the request instead of doing its work again.
    """

    def __init__(
        self,
        prompt: dict[str, Any],
        request: EngineCoreRequest,
        params: SamplingParams,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__(prompt)
        self._request: EngineCoreRequest | None = request
        self._params = params
        self._arguments = arguments

    def take(
        self, params: SamplingParams, arguments: dict[str, Any]
    ) -> EngineCoreRequest | None:
        """The request, once; None where it was made with other arguments."""
        made, given = self._arguments, arguments
        same = params is self._params and all(
            (made.get(name) or None) == (given.get(name) or None) for name in _SAME
        )
        if not same or self._request is None:
            return None
        request, self._request = self._request, None
        # vLLM drops them where nobody traces.
        request.trace_headers = arguments.get("trace_headers")
        return request


def is_rendered(prompt: Any) -> bool:
    """Whether vLLM has tokenised a prompt, so that validating it does not block."""
    return isinstance(prompt, dict) and "type" in prompt
