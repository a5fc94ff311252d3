"""The small interface through which a prefill drives a model."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from asl_vllm.prefill.shape import ModelShape
from asl_vllm.prefill.tap import LayerTap


class Verdict(enum.Enum):
    """What an exchange among ranks comes to, the same on each."""

    SAME = "same"
    DIFFERENT = "different"
    FAILED = "failed"


@dataclass(frozen=True)
class Known:
    """First rows of a sequence in a layer, whose keys and values are known."""

    keys: torch.Tensor
    """``[n, Hkv, D]``, of positions 0 to n - 1."""
    values: torch.Tensor
    """``[n, Hkv, Dv]``."""


class DecoderModel(Protocol):
    """A decoder whose layers can be called one at a time.

    The caller owns all tensors it passes; implementations keep no reference to
    them after a call returns.
    """

    shape: ModelShape

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [n] at positions [n] -> hidden states [n, hidden_size]."""
        ...

    def run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> None:
        """Sends rows ``[start, start + n)`` of a sequence through one layer.

        ``positions`` [n] are the tokens' original positions and ``hidden`` [n, E]
        their states, replaced in place by the layer's output. Attention sees the
        rows ``[0, start + n)`` of this layer; earlier rows were run before, in
        order. The tap receives the chunk's queries, keys and values; where it asks
        for these only, ``hidden`` is left undefined.

        ``lengths``, where given: the n rows are those of several sequences, so many of
        each, one after the other, none of which sees another; ``start`` is 0.
        ``loaded``: rows of each that `load_prefixes` put before them.
        """
        ...

    def load_prefixes(
        self,
        layer: int,
        block_ids: torch.Tensor,
        into: Sequence[Known],
        lengths: Sequence[int] = (),
    ) -> None:
        """Makes what blocks of the KV pool hold the first rows of a layer.

        ``block_ids`` int64: whole blocks, in order, of each sequence after another.
        ``into``, one for each, receives their rows; attention of rows that `run_layer`
        sends after them sees them as rows run before. ``lengths``: rows that
        `run_layer` will send of each, where there are several; a sequence without a
        prefix has an ``into`` of no rows.
        """
        ...

    def run_at(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> None:
        """Sends tokens of sequences through one layer whose keys and values are known.

        ``lengths``: tokens of each sequence, one after another; ``known``: what they
        see. Their ``positions`` [n] ascend and may have gaps. A token attends to the
        keys up to its own position, itself included. ``hidden`` [n, E] is replaced in
        place. Leaves no keys anywhere.
        """
        ...

    def write_kept(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Writes kept rows [n, Hkv, D] of a layer to the slots [n] of the KV pool."""
        ...

    def attention_scale(self, layer: int) -> float:
        """The factor on q k^T of a layer, usually 1/sqrt(head_dim)."""
        ...

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks."""
        ...

    def sum_over_ranks(self, layer_score: torch.Tensor) -> torch.Tensor:
        """Sums a [T] score over the tensor-parallel ranks; the same on each."""
        ...

    def exchange(self, failed: bool, digest: bytes) -> Verdict:
        """Tells all ranks whether this one failed, and if none did compares ``digest``.

        ``digest``: 32 bytes, or none, which equals none only. Every rank must ask.
        """
        ...
