"""Requests that come to the same pruned prompt: samples of one request, retries.

They have the same tokens, salt and plan, so their pruned caches are equal to the bit.
One is prefilled; the others wait for it and then share its whole blocks, which nobody
writes to any more, and go on in a copy of the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asl_vllm.engine.plan import PrunePlan

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Twins:
    """Knows which live requests have, or will have, the cache of which prompt.

    Args:
        is_loading: Whether a request's prefill is under way.
        is_whole: Whether a request holds the blocks of a finished prefill.
    """

    def __init__(
        self, is_loading: Callable[[str], bool], is_whole: Callable[[str], bool]
    ) -> None:
        self._is_loading = is_loading
        self._is_whole = is_whole
        self._keys: dict[str, Any] = {}
        self._holders: dict[Any, dict[str, None]] = {}

    def add(self, request: Request, plan: PrunePlan) -> None:
        """A request that may share comes; it has its block hashes still.

        They are chained and hold the salt, so tenants are apart as in vLLM's own cache.
        """
        hashes = request.block_hashes
        # Where some are absent later, nobody knows which before the prefill has ended.
        if plan.absent_blocks < plan.pruned_blocks or not hashes:
            return
        assert request.prompt_token_ids is not None
        rest = request.prompt_token_ids[len(hashes) * plan.block_size :]
        key = (hashes[-1], tuple(rest), plan.policy, plan.pruned_blocks)
        self._keys[request.request_id] = key

    def find(self, request_id: str) -> str | None:
        """A twin that holds the blocks, or else one that is loading; None: neither."""
        holders = self._holders.get(self._keys.get(request_id), {})
        others = [name for name in holders if name != request_id]
        for able in (self._is_whole, self._is_loading):
            for name in others:
                if able(name):
                    return name
        return None

    def holds(self, request_id: str) -> None:
        """A request got its blocks, to be prefilled into or shared with a twin.

        The longest holders are found first: the last block of one that got its own in
        this very step is copied at the step's beginning only, as others' are.
        """
        key = self._keys.get(request_id)
        if key is not None:
            holders = self._holders.setdefault(key, {})
            holders.pop(request_id, None)
            holders[request_id] = None

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        key = self._keys.pop(request_id, None)
        holders = self._holders.get(key)
        if holders is not None:
            holders.pop(request_id, None)
            if not holders:
                del self._holders[key]
