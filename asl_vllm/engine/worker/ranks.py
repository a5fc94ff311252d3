"""What tensor-parallel ranks do together in a prefill.

Touch points: `get_tp_group` and `tensor_model_parallel_all_reduce`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce

from asl_vllm.prefill import RankLostError, Verdict

_DIGEST = struct.Struct("<8I")


@contextmanager
def among_ranks(what: str) -> Iterator[None]:
    """Around what ranks do together; one that fails in it leaves the others waiting.

    Raises:
        RankLostError: instead of an error, where there are other ranks.
    """
    try:
        yield
    except Exception as error:
        if get_tp_group().world_size == 1:
            raise
        raise RankLostError(f"{what} failed on one rank: {error!r}") from error


class Ranks:
    """The methods of `asl_vllm.prefill.DecoderModel` that are about ranks."""

    @property
    def num_ranks(self) -> int:
        """See `DecoderModel.num_ranks`."""
        size: int = get_tp_group().world_size
        return size

    def sum_over_ranks(self, layer_score: torch.Tensor) -> torch.Tensor:
        """See `DecoderModel.sum_over_ranks`."""
        with among_ranks("the sum of scores"):
            return tensor_model_parallel_all_reduce(layer_score)

    def greatest(self, number: float) -> float:
        """The greatest of the ranks' numbers, the same on each: one all-reduce."""
        group = get_tp_group()
        if group.world_size == 1:
            return number
        with among_ranks("the comparison"):
            shared = torch.tensor(number, dtype=torch.float64)
            torch.distributed.all_reduce(
                shared, torch.distributed.ReduceOp.MAX, group=group.cpu_group
            )
        return shared.item()

    def exchange(self, failed: bool, digest: bytes) -> Verdict:
        """See `DecoderModel.exchange`: one all-reduce."""
        group = get_tp_group()
        if group.world_size == 1:
            return Verdict.FAILED if failed else Verdict.SAME
        words = _DIGEST.unpack(digest) if digest else (0,) * 8
        # The greatest of both signs: all ranks see the same numbers, and where ranks
        # differ the greatest is not the least.
        brought = [len(digest), *words]
        numbers = [failed, *brought, *(-word for word in brought)]
        # Over the CPU group: it works whatever state the device is in.
        with among_ranks("the exchange"):
            shared = torch.tensor(numbers, dtype=torch.int64)
            torch.distributed.all_reduce(
                shared, torch.distributed.ReduceOp.MAX, group=group.cpu_group
            )
        any_failed, *both = shared.tolist()
        if any_failed:
            return Verdict.FAILED
        greatest, least = both[: len(brought)], both[len(brought) :]
        same = all(a == -b for a, b in zip(greatest, least, strict=True))
        return Verdict.SAME if same else Verdict.DIFFERENT
