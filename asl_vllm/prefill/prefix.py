"""The leading tokens of a prompt that a prefill takes from the KV pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asl_vllm.prefill.buffers import Rows
from asl_vllm.prefill.job import PrefillJob
from asl_vllm.prefill.model import DecoderModel, Known
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

    def blocks(self, layer: int) -> torch.Tensor:
        """Ids int64 of the blocks that hold it in this layer; none if ``rows`` is 0."""
        if not self.rows:
            return self._blocks.new_empty(0)
        return self._blocks[self._tables.row(layer)]

    def known(self, buffers: Rows) -> Known:
        """Where the prefix is, once it is loaded."""
        return Known(buffers.keys[: self.rows], buffers.values[: self.rows])

    def load(self, layer: int, buffers: Rows) -> None:
        """Makes the prefix the first rows of this layer, in the buffers too."""
        into = [self.known(buffers)]
        self._model.load_prefixes(layer, self.blocks(layer), into)


def load_together(
    model: DecoderModel,
    layer: int,
    prefixes: Sequence[CachedPrefix],
    into: Sequence[Known],
    lengths: Sequence[int],
) -> None:
    """`CachedPrefix.load` of several, be they empty, before rows that pass together."""
    blocks = torch.cat([prefix.blocks(layer) for prefix in prefixes])
    model.load_prefixes(layer, blocks, into, lengths)
