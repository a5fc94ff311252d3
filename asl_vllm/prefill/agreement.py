"""What one tensor-parallel rank found made known to all, so that none waits alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from asl_vllm.prefill.model import DecoderModel, Verdict


class OtherRankError(RuntimeError):
    """Another tensor-parallel rank failed, so this one ends the same job."""


class RanksDifferError(RuntimeError):
    """Tensor-parallel ranks came to different tokens."""


class RankLostError(BaseException):
    """A rank failed where others wait for it and are not told.

    No `Exception`: nothing that ends one job may catch it, the process must end.
    """


@dataclass
class Exchange:
    """What this rank brings to an exchange."""

    digest: bytes = b""
    """Of what must be the same on all ranks."""


def digest_of(tokens: torch.Tensor) -> bytes:
    """SHA-256 of int64 tokens: equal where they and their order are.

    Synchronises with the host.
    """
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).digest()


@contextmanager
def agreed(model: DecoderModel) -> Iterator[Exchange]:
    """Ends on all ranks with an error, or on none: one exchange.

    Every rank must enter and leave it at the same point of a prefill, and nothing in
    it may wait for other ranks except where all are sure to arrive.

    Raises:
        Exception: this rank's own error.
        OtherRankError: this rank had none, but another one had.
        RanksDifferError: none had, but their digests differ.
    """
    brought = Exchange()
    error: Exception | None = None
    try:
        yield brought
    except Exception as raised:
        error = raised
    verdict = model.exchange(error is not None, brought.digest)
    if error is not None:
        raise error
    if verdict is Verdict.FAILED:
        raise OtherRankError("another tensor-parallel rank failed; see its log.")
    if verdict is Verdict.DIFFERENT:
        raise RanksDifferError("tensor-parallel ranks came to different tokens.")


@contextmanager
def unexchanged(model: DecoderModel) -> Iterator[None]:
    """Around work of which no other rank hears, to save the exchange.

    Raises:
        RankLostError: instead of an error, where there are other ranks.
    """
    try:
        yield
    except Exception as error:
        if model.num_ranks == 1:
            raise
        raise RankLostError(f"failed on one rank: {error!r}") from error
