"""Selected tokens of a cached prefix, sent through the layers again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asl_vllm.prefill.buffers import Rows
from asl_vllm.prefill.hidden import HiddenStates, Ranges
from asl_vllm.prefill.model import DecoderModel, Known
from asl_vllm.prefill.prefix import CachedPrefix, load_together


class Rerun:
    """Selected tokens of a cached prefix, sent through layers 0 to ``last`` again.

    Nobody stored their hidden states, so these are computed anew, for them alone: a
    token attends to the cached keys up to its own position, as it did the first time.
    They are the first ``num_rows`` rows of the buffers' hidden states in the end, and
    overwrite the buffers' keys and values.
    """

    def __init__(
        self,
        prefix: CachedPrefix,
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        last: int,
    ) -> None:
        self.prefix = prefix
        self.positions = positions
        self.token_ids = token_ids[positions]
        self.layer = 0
        self.num_rows = len(positions)
        self._last = last
        self._row = 0

    @property
    def done(self) -> bool:
        """Whether they are through the last of these layers."""
        return self.layer > self._last

    def next_rows(self, chunk_tokens: int) -> int:
        """Rows of the pass that runs next."""
        return min(chunk_tokens, self.num_rows - self._row)

    def run_pass(self, model: DecoderModel, buffers: Rows, chunk_tokens: int) -> None:
        """Sends one chunk through one layer."""
        start, end = self._row, self._row + self.next_rows(chunk_tokens)
        if start == 0:
            self.prefix.load(self.layer, buffers)
        positions = self.positions[start:end]
        if self.layer == 0:
            hidden = model.embed(self.token_ids[start:end], positions)
        else:
            hidden = buffers.hidden.load(start, end)
        known = [self.prefix.known(buffers)]
        model.run_at(self.layer, positions, hidden, known, [end - start])
        buffers.hidden.store(start, hidden)
        self._row = end
        if end == self.num_rows:
            self.passed()

    def passed(self) -> None:
        """All of its rows have passed the layer."""
        self.layer, self._row = self.layer + 1, 0
        if self.done:
            self.prefix.rows = 0


def rerun_together(
    reruns: Sequence[Rerun],
    into: Sequence[Known],
    ranges: Ranges,
    model: DecoderModel,
    hidden_states: HiddenStates,
) -> None:
    """Sends all rows of several through one layer, the same of each, at once.

    ``into`` receives their prefixes; ``ranges`` of the hidden states are their rows.
    """
    layer = reruns[0].layer
    assert all(rerun.layer == layer for rerun in reruns)
    load_together(model, layer, [rerun.prefix for rerun in reruns], into, ())
    positions = torch.cat([rerun.positions for rerun in reruns])
    if layer == 0:
        token_ids = torch.cat([rerun.token_ids for rerun in reruns])
        hidden = model.embed(token_ids, positions)
    else:
        hidden = hidden_states.load_several(ranges)
    lengths = [rerun.num_rows for rerun in reruns]
    model.run_at(layer, positions, hidden, into, lengths)
    hidden_states.store_several(ranges, hidden)
    for rerun in reruns:
        rerun.passed()
