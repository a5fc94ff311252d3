"""Where a prefill meets bands and windows: the block tables of a prompt's layers."""

from __future__ import annotations

from asl_vllm.prefill.bands import Bands
from asl_vllm.prefill.job import PrefillJob
from asl_vllm.prefill.shape import ModelShape


class BlockTables:
    """Which of them a layer's tokens go to, and whether a layer keeps every token.

    The latter (``kv_shallow`` "full") ends with the band of the layer after which
    tokens are left behind.
    """

    def __init__(self, job: PrefillJob, shape: ModelShape) -> None:
        # Beside layers with a window the tables of the others are no bands.
        self._bands = Bands(shape.num_layers, 1 if shape.windows else job.bands)
        self._groups = shape.groups
        self.pruned_bands = 0 if job.keep_shallow else job.bands
        """So many of the deepest bands lack the pruned blocks; 0: so far none does."""

    def row(self, layer: int) -> int:
        """The table of a layer, a row of what the job names for each band.

        Of a layer with a sliding window, a row of its `PrefillJob.window_blocks`.
        """
        return self._groups[layer] if self._groups else self._bands.of(layer)

    @property
    def keeps_all(self) -> bool:
        """Whether the layer that runs keeps every token."""
        return not self.pruned_bands

    def may_leave(self, layer: int) -> bool:
        """Whether tokens may be left behind after a layer.

        A band has one block table, so where it keeps all tokens they pass all of it.
        """
        return not self.keeps_all or self._bands.ends(layer)

    def left(self, layer: int) -> None:
        """Tokens were left behind after a layer: deeper ones lack the pruned blocks."""
        if self.keeps_all:
            # 0 after the last band: then no layer follows.
            self.pruned_bands = self._bands.below(layer)
