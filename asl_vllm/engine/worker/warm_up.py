"""Prefills that nobody asked for, so that none that is asked for waits for a compiler.

Touch points: vLLM's `PAD_SLOT_ID`, the slot that its kernels write nothing to, and
block 0 of its KV pool, the null block, which may be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from asl_vllm.prefill import Pack, Packer, Prefill, PrefillFactory, PrefillJob
from asl_vllm.selection.errors import SelectionError

logger = init_logger(__name__)

_KEPT = 8
"""Tokens kept beside the window: few, so that short prompts are pruned."""


class _Unwritten(PrefillJob):
    """Has no slots: what it keeps is written nowhere."""

    def slots(self) -> torch.Tensor:
        """See `PrefillJob.slots`."""
        return torch.full_like(super().slots(), PAD_SLOT_ID)

    def window_slots(self) -> list[torch.Tensor]:
        """See `PrefillJob.window_slots`."""
        slots = super().window_slots()
        return [torch.full_like(row, PAD_SLOT_ID) for row in slots]


def warm_up(
    factory: PrefillFactory,
    policies: Iterable[str],
    bands: int,
    packer: Packer,
    cached_block: int | None = None,
) -> None:
    """Runs each policy on short prompts, and one on a full chunk and a token more.

    Then the short ones together, and each policy on a prompt of which blocks of the KV
    pool, of ``cached_block`` tokens, are read, alone and together; None: no prompt can
    do so. Between them they run every kernel, whatever the number of tokens: kernels
    are compiled for one token or for several, and for numbers of 16 or others. Writes
    nothing to the KV pool. All tensor-parallel ranks must call it.
    """
    names = list(policies)
    jobs = [
        _job(factory, f"warm-up-{number}", policy, tokens, bands)
        for number, (policy, tokens) in enumerate(_prompts(factory, names))
    ]
    for job in jobs:
        _run(factory(job))
    _run_together(factory, packer, jobs)
    if cached_block is not None:
        jobs = [_reading(factory, policy, bands, cached_block) for policy in names]
        fit = [j for j in jobs if j.num_prompt_tokens <= factory.buffers.capacity]
        for job in fit:
            _run(factory(job))
        _run_together(factory, packer, fit)


def _run_together(
    factory: PrefillFactory, packer: Packer, jobs: list[PrefillJob]
) -> None:
    while jobs:
        count = packer.count(jobs, ())
        if count > 1:
            _run(packer.pack([factory(job) for job in jobs[:count]]))
        jobs = jobs[count:]


def _job(
    factory: PrefillFactory, name: str, policy: str, tokens: int, bands: int
) -> PrefillJob:
    kept = factory.config.window + _KEPT
    shape = factory.model.shape
    rows = shape.full_groups if shape.windows else bands
    windows = shape.window_groups if shape.windows else 0
    return _Unwritten(
        request_id=name,
        policy=policy,
        prompt_token_ids=[0] * tokens,
        pruned_blocks=tokens - kept,
        block_size=1,
        block_ids=[[0] * (kept - 1)] * rows,
        window_blocks=[(0, [0] * tokens)] * windows,
    )


def _reading(
    factory: PrefillFactory, policy: str, bands: int, block: int
) -> PrefillJob:
    """All before the window is read, so what is selected of it is computed again.

    It is the null block, twice, of which one block's tokens are pruned.
    """
    window = factory.config.window
    return _Unwritten(
        request_id=f"warm-up-reading-{policy}",
        policy=policy,
        prompt_token_ids=[0] * (2 * block + window),
        pruned_blocks=1,
        block_size=block,
        block_ids=[[0] * (1 + cdiv(window, block))] * bands,
        reused_block_ids=[[0, 0]] * bands,
    )


def _run(prefill: Prefill | Pack) -> None:
    try:
        while not prefill.done:
            prefill.advance(1)
    except SelectionError as error:
        # As with weights that are no model's. Requests will be told the same.
        logger.warning("asl_vllm: warming up: %s", error)


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
    # Tokens before the window are left out: fewer than half go deeper.
    window = factory.model.shape.widest_window
    if window and 2 * window + least <= capacity:
        yield "fastkv", 2 * window + least
    # In two passes: one full, and one of a single token.
    if least <= chunk < capacity:
        yield factory.config.policy, chunk + 1
