"""What is asked of a pruned prefill and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from asl_vllm.selection.budget import PrunedPrompt


@dataclass(frozen=True, kw_only=True)
class PrefillJob(PrunedPrompt):
    """One prompt to prefill into given blocks. Plain data: it crosses processes.

    The leading ``pruned_blocks`` of the prompt's logical blocks hold nothing: the kept
    tokens of a layer occupy the logical positions ``[pruned_tokens, N)``.
    ``block_ids`` are the blocks of all the others, in order; of all blocks with
    ``keep_shallow``. A row for each band of layers.

    ``keep_shallow``: the layers of the selection layer's band and of all bands before
    it keep every token, and only deeper ones the kept tokens.

    ``window_blocks`` are of each group of layers with a sliding window: the logical
    block that its ids begin with, and the ids, up to the last token's. They hold the
    newest tokens at their own positions.

    ``reused_block_ids`` are whole blocks that hold the prompt's leading tokens already,
    a row for each band; they are only read. At least the window lies behind them.
    """

    request_id: str
    policy: str
    prompt_token_ids: Sequence[int]
    """An ``array`` where it is to be sent: it costs a hundredth of a list."""
    pruned_blocks: int
    block_size: int
    block_ids: Sequence[Sequence[int]]
    keep_shallow: bool = False
    reused_block_ids: Sequence[Sequence[int]] = ()
    window_blocks: Sequence[tuple[int, Sequence[int]]] = ()

    @property
    def num_prompt_tokens(self) -> int:  # type: ignore[override]
        """N."""
        return len(self.prompt_token_ids)

    @property
    def bands(self) -> int:
        """Bands of layers, each with blocks of its own."""
        return len(self.block_ids)

    @property
    def reused_tokens(self) -> int:
        """Leading tokens that are not computed but read, h."""
        rows = self.reused_block_ids
        return len(rows[0]) * self.block_size if rows else 0

    def slots(self) -> torch.Tensor:
        """Slot ids int64 [bands, n], on the CPU: of positions with a block, less one.

        The last prompt token is computed by the engine's own step, which samples from
        it.
        """
        first = 0 if self.keep_shallow else self.pruned_tokens
        return self._slots([list(row) for row in self.block_ids], first)

    def window_slots(self) -> list[torch.Tensor]:
        """Slot ids int64 [n] of each group of `window_blocks`, as `slots`."""
        return [
            self._slots([list(ids)], first * self.block_size)[0]
            for first, ids in self.window_blocks
        ]

    def _slots(self, block_ids: list[list[int]], first: int) -> torch.Tensor:
        """Of positions from ``first``, where each row begins, to the last but one."""
        ids = torch.tensor(block_ids, dtype=torch.int64)
        within = torch.arange(self.block_size)
        slots = ids[:, :, None] * self.block_size + within
        return slots.flatten(1)[:, : self.num_prompt_tokens - 1 - first]


@dataclass(frozen=True)
class PrefillProgress:
    """How far a running prefill is. Plain data: it crosses processes."""

    layer: int
    """The layer that runs next; the number of layers when all are done."""
    selection_layer: int | None
    """None until the layer is found, and where none is."""


@dataclass(frozen=True)
class PrefillReport:
    """What a finished prefill did. Plain data: it crosses processes.

    ``selection_layer`` is the first layer after which tokens were dropped; None: they
    went through all layers. A token-layer is one token through one decoder layer;
    ``skipped`` counts those that an unpruned prefill would have computed in addition,
    0 where a policy that restarts computed more. ``pruned_bands`` are the deepest
    bands, those whose layers lack the pruned blocks; 0: none does.

    ``reused`` are token-layers read instead of computed, and ``rerun`` those of them
    that were computed after all, for the hidden states of selected tokens; these are
    ``computed`` too. So computed + skipped + reused - rerun are a full prefill's.
    """

    selection_layer: int | None
    computed_token_layers: int
    skipped_token_layers: int
    seconds: float
    pruned_bands: int = 1
    reused_tokens: int = 0
    reused_token_layers: int = 0
    rerun_token_layers: int = 0
    filled_tokens: int = 0
    """Of the reused ones, those that were computed for this prompt before, by an
    ordinary prefill; set by who asked for that."""
    shared: bool = False
    """Another request's prefill, of the same prompt: nothing was computed for this."""

    def as_shared(self, num_tokens: int) -> PrefillReport:
        """What a request reports that took ``num_tokens`` over from this prefill."""
        taken = self.computed_token_layers - self.rerun_token_layers
        return replace(
            self,
            computed_token_layers=0,
            seconds=0.0,
            reused_tokens=num_tokens,
            reused_token_layers=self.reused_token_layers + taken,
            rerun_token_layers=0,
            filled_tokens=0,
            shared=True,
        )
