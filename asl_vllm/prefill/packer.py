"""Which prompts are prefilled together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from asl_vllm.prefill.factory import PrefillFactory
from asl_vllm.prefill.job import PrefillJob
from asl_vllm.prefill.pack import Pack
from asl_vllm.prefill.passes import Prefill

_SHORT = 4
"""A chunk has room for as many short prompts. Longer ones keep a device busy alone, and
a short one that passed with them would end when they do."""


MOST_PACKED = 32
"""Prompts at once: each has window queries reserved."""


def most_packed(chunk_tokens: int, window: int) -> int:
    """Prompts that pass together at most; each keeps more than the window."""
    return max(1, min(MOST_PACKED, chunk_tokens // (window + 2)))


class Packer:
    """Makes `Pack` of prompts that follow each other in the queue.

    Args:
        factory: Makes their prefills.
        page: Rows that a sequence's place in the model's memory is a multiple of.
    """

    def __init__(self, factory: PrefillFactory, page: int = 1) -> None:
        self._factory = factory
        self._page = page

    def count(self, waiting: Iterable[PrefillJob], alone: Collection[str]) -> int:
        """How many of the first in the queue run together; at least 1.

        All of them are short, or what passes of them is, and fit into one chunk, so
        that a pass is no longer than that of a long prompt. Those in ``alone`` run
        alone.
        """
        buffers, chunk = self._factory.buffers, self._factory.chunk_tokens
        most = chunk // _SHORT
        count = tokens = rows = 0
        for job in waiting:
            passing = self._factory.most_passing(job)
            tokens += passing
            rows += -(-job.num_prompt_tokens // self._page) * self._page
            fits = tokens <= chunk and rows <= buffers.capacity
            if not fits or passing > most or job.request_id in alone:
                break
            count += 1
            if count == buffers.packed:
                break
        return max(count, 1)

    def pack(self, prefills: Sequence[Prefill]) -> Pack:
        """They run together, as `count` said they may."""
        return Pack(prefills, self._factory.model, self._factory.buffers)
