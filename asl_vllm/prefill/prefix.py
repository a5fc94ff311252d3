"""The leading tokens of a prompt that a prefill takes from the KV pool."""

from __future__ import annotations

import torch

from asl_vllm.prefill.buffers import Rows
from asl_vllm.prefill.job import PrefillJob
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.tables import BlockTables


class CachedPrefix:
    """The first ``rows`` tokens of a prompt: computed before, in whole blocks.

    While ``rows`` is not 0, a layer's first rows are read from the pool and only those
    behind them are computed. Once tokens are selected none is left: the selected ones
    among them went through the layers again, see `Rerun`, and are rows like others.
    """

    def __init__(
        self, job: PrefillJob, model: DecoderModel, tables: BlockTables
    ) -> None:
        self.rows = job.reused_tokens
        self._model = model
        self._tables = tables
        self._blocks = torch.tensor(
            [list(ids) for ids in job.reused_block_ids],
            dtype=torch.int64,
            device=model.shape.device,
        )

    def load(self, layer: int, buffers: Rows) -> None:
        """Makes the prefix the first rows of this layer, in the buffers too."""
        self._model.load_prefix(
            layer,
            self._blocks[self._tables.row(layer)],
            buffers.keys[: self.rows],
            buffers.values[: self.rows],
        )


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
        self._prefix = prefix
        self._positions = positions
        self._token_ids = token_ids[positions]
        self._last = last
        self._layer = 0
        self._row = 0
        self.num_rows = len(positions)

    @property
    def done(self) -> bool:
        """Whether they are through the last of these layers."""
        return self._layer > self._last

    def next_rows(self, chunk_tokens: int) -> int:
        """Rows of the pass that runs next."""
        return min(chunk_tokens, self.num_rows - self._row)

    def run_pass(self, model: DecoderModel, buffers: Rows, chunk_tokens: int) -> None:
        """Sends one chunk through one layer."""
        start, end = self._row, self._row + self.next_rows(chunk_tokens)
        if start == 0:
            self._prefix.load(self._layer, buffers)
        positions = self._positions[start:end]
        if self._layer == 0:
            hidden = model.embed(self._token_ids[start:end], positions)
        else:
            hidden = buffers.hidden.load(start, end)
        rows = self._prefix.rows
        model.run_at(
            self._layer,
            positions,
            hidden,
            buffers.keys[:rows],
            buffers.values[:rows],
        )
        buffers.hidden.store(start, hidden)
        self._row = end
        if end == self.num_rows:
            self._layer, self._row = self._layer + 1, 0
            if self.done:
                self._prefix.rows = 0
