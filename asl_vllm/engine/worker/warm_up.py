"""Prefills that nobody asked for, so that none that is asked for waits for a compiler.

Touch point: vLLM's `PAD_SLOT_ID`, the slot that its kernels write nothing to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm.logger import init_logger
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from asl_vllm.prefill import PrefillFactory, PrefillJob
from asl_vllm.selection.errors import SelectionError

logger = init_logger(__name__)

_KEPT = 8
"""Tokens kept beside the window: few, so that short prompts are pruned."""


def warm_up(factory: PrefillFactory, policies: Iterable[str], bands: int) -> None:
    """Runs each policy on short prompts, and one on a full chunk and a token more.

    Between them they run every kernel, whatever the number of tokens: kernels are
    compiled for one token or for several, and for numbers of 16 or others. Writes
    nothing to the KV pool. All tensor-parallel ranks must call it.
    """
    for policy, tokens in _prompts(factory, list(policies)):
        kept = factory.config.window + _KEPT
        job = PrefillJob(
            request_id="warm-up",
            policy=policy,
            prompt_token_ids=[0] * tokens,
            pruned_blocks=tokens - kept,
            block_size=1,
            block_ids=[[PAD_SLOT_ID] * (kept - 1)] * bands,
        )
        try:
            prefill = factory(job)
            while not prefill.done:
                prefill.advance(factory.chunk_tokens)
        except SelectionError as error:
            # As with weights that are no model's. Requests will be told the same.
            logger.warning("asl_vllm: warming up %s: %s", policy, error)


def _prompts(factory: PrefillFactory, policies: list[str]) -> Iterator[tuple[str, int]]:
    """Policy and length of each prompt; none where no prompt can be pruned."""
    capacity, chunk = factory.buffers.capacity, factory.chunk_tokens
    least = factory.config.window + _KEPT + 1
    # Numbers of 16, with and without the window, and others.
    short = (least // 16 + 2) * 16
    lengths = [
        n for n in (short, short + 1, short + factory.config.window) if n <= capacity
    ]
    for policy in policies:
        for tokens in lengths:
            yield policy, tokens
    # In two passes: one full, and one of a single token.
    if least <= chunk < capacity:
        yield factory.config.policy, chunk + 1
