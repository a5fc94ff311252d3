"""Outputs of steps in flight whose request is gone when they arrive.

vLLM drops them, and finds requests by id: under an id that was used again it would
take them for the new request's, whose counters then end the engine. Ids repeat where
they are not randomised (``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION``). So a new request is
told how much of the old one is in flight, as vLLM itself notes of a request that its
cache's reset took back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


class StaleOutputs:
    """Tokens in flight of requests that ended, by id; empty but for some steps."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def end(self, request: Request) -> None:
        """A request ended; a step may hold it still."""
        if request.num_in_flight_tokens:
            self._tokens[request.request_id] = request.num_in_flight_tokens

    def begin(self, request: Request) -> None:
        """A request came, maybe under the id of one that ended."""
        if tokens := self._tokens.pop(request.request_id, 0):
            request.num_in_flight_tokens = tokens
            request.num_stale_output_tokens = tokens
            request.drop_stale_output = True

    def arrive(self, num_scheduled_tokens: Mapping[str, int]) -> None:
        """The output of a step is about to be taken in: so many tokens, by id."""
        for request_id in self._tokens.keys() & num_scheduled_tokens.keys():
            self._tokens[request_id] -= num_scheduled_tokens[request_id]
            assert self._tokens[request_id] >= 0, request_id
            if not self._tokens[request_id]:
                del self._tokens[request_id]
