"""Ordinary requests that put a pruned prompt's prefix into vLLM's prefix cache first.

A fill is a request of vLLM's own: the tokens that the pruned one may read, and one
token to generate. It is batched, chunked, preempted and finds what is cached like any
other. The pruned request waits for its end without holding back those behind it, and is
pruned over what it finds then. Front ends never hear of a fill.

Touch points: ``Request``; ``add_request``, ``finish_requests`` and the waiting queue of
vLLM's `Scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.sampling_params import SamplingParams
from vllm.utils import random_uuid
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput
_Named = TypeVar("_Named", "EngineCoreOutput", Request)


@dataclass
class _Fill:
    request: Request
    key: Any
    owner: str
    """Who asked first: what is computed is computed for it."""
    waiting: set[str] = field(default_factory=set)
    """Who has not been given blocks yet: the prefix is to stay until then."""
    cached_tokens: int | None = None
    """What it found itself."""
    ended: bool = False


class Fills:
    """Owns the fills, and which requests wait for which; each has at most one."""

    def __init__(self) -> None:
        self._of: dict[str, _Fill] = {}
        self._alive: dict[str, _Fill] = {}
        self._by_key: dict[Any, _Fill] = {}
        self._new: list[Request] = []
        self._unwanted: set[str] = set()
        self._just_ended: set[str] = set()

    def asked(self, request_id: str) -> bool:
        """Whether a request has, or had, a fill."""
        return request_id in self._of

    def waits(self, request_id: str) -> bool:
        """Whether a request's fill has not ended."""
        fill = self._of.get(request_id)
        return fill is not None and not fill.ended

    def has(self, hashes: Sequence[Any]) -> bool:
        """Whether a fill that has not ended puts just these blocks there."""
        return bool(hashes) and hashes[-1] in self._by_key

    def ask(self, request: Request, hashes: Sequence[Any], num_tokens: int) -> None:
        """A request wants its first tokens, whole blocks with these hashes, cached.

        Those that want the same share a fill.
        """
        key = hashes[-1]
        fill = self._by_key.get(key)
        if fill is None:
            filling = _request(request, hashes, num_tokens)
            fill = _Fill(filling, key, request.request_id)
            self._by_key[key] = self._alive[filling.request_id] = fill
            self._new.append(filling)
        self._unwanted.discard(fill.request.request_id)
        fill.waiting.add(request.request_id)
        self._of[request.request_id] = fill

    def on_allocated(self, request: Request) -> None:
        """A request that is not pruned got blocks; a fill has found what is cached."""
        fill = self._alive.get(request.request_id)
        if fill is None or request.prefill_stats is None:
            return
        # After a preemption it finds its own.
        if fill.cached_tokens is None:
            fill.cached_tokens = request.prefill_stats.num_cached_tokens

    def serve(self, request_id: str) -> None:
        """A pruned request got its blocks; what it reads is pinned."""
        if fill := self._of.get(request_id):
            fill.waiting.discard(request_id)

    @property
    def promised_blocks(self) -> int:
        """Blocks a manager of all prefixes that somebody still waits for."""
        fills = {id(fill): fill for fill in self._of.values() if fill.waiting}
        return sum(len(fill.request.block_hashes) for fill in fills.values())

    def forget(self, request_id: str) -> None:
        """A request has ended, be it a fill or one that had asked for one."""
        if fill := self._alive.pop(request_id, None):
            fill.ended = True
            self._just_ended.add(request_id)
            del self._by_key[fill.key]
            self._unwanted.discard(request_id)
        if fill := self._of.pop(request_id, None):
            fill.waiting.discard(request_id)
            if not fill.waiting and not fill.ended:
                self._drop(fill)

    def _drop(self, fill: _Fill) -> None:
        """Nobody waits for it any more."""
        if fill.request in self._new:
            self._new.remove(fill.request)
            del self._alive[fill.request.request_id], self._by_key[fill.key]
        else:
            self._unwanted.add(fill.request.request_id)

    def filled_tokens(self, request_id: str) -> int:
        """Tokens that an ended fill computed for this request."""
        fill = self._of.get(request_id)
        if fill is None or not fill.ended or fill.owner != request_id:
            return 0
        return fill.request.num_prompt_tokens - (fill.cached_tokens or 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Fills that have not ended."""
        return tuple(self._alive)

    def for_clients(self, those: list[_Named]) -> list[_Named]:
        """Outputs, or requests, that are no fills'."""
        ours = self._alive.keys() | self._just_ended
        if not ours:
            return those
        return [one for one in those if one.request_id not in ours]

    def on_told(self, scheduler: Scheduler) -> None:
        """A step's outputs are with the clients: what fills ended is over."""
        self._just_ended.clear()
        self.settle(scheduler)

    def settle(self, scheduler: Scheduler) -> None:
        """Begins fills that were asked for, and ends those that nobody waits for.

        Between two steps. Who asks has its turn, so its fill is the next in the queue.
        """
        new, self._new = self._new, []
        for request in reversed(new):
            scheduler.add_request(request)
            scheduler.waiting.remove_request(request)
            scheduler.waiting.prepend_request(request)
        unwanted, self._unwanted = self._unwanted, set()
        if unwanted:
            scheduler.finish_requests(unwanted, RequestStatus.FINISHED_ABORTED)


def _request(asking: Request, hashes: Sequence[Any], num_tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    assert asking.prompt_token_ids is not None
    request = Request(
        request_id=f"asl-fill-{random_uuid()}",
        prompt_token_ids=list(asking.prompt_token_ids[:num_tokens]),
        sampling_params=params,
        pooling_params=None,
        client_index=asking.client_index,
        arrival_time=asking.arrival_time,
        lora_request=asking.lora_request,
        cache_salt=asking.cache_salt,
        priority=asking.priority,
    )
    # Chained, with salt and all: those that a hasher would come to.
    request.block_hashes = list(hashes)
    return request
