"""Collects what one attention layer sees while a prompt's chunks pass it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asl_kernels.attention_at import attention_at
from asl_kernels.gather_kept import gather_tokens
from asl_vllm.prefill.buffers import PrefillBuffers


class KeysTaken(Exception):
    """Raised out of a layer whose output nobody needs, once its keys are taken."""


class LayerTap:
    """Copies a layer's keys, values and window queries into `PrefillBuffers`.

    Of one prompt; see `PackTap` for several. Row r of the buffers is row r of the
    sequence in this layer (an index into the tokens that entered the layer, not a
    position). The engine calls `on_kv` and `on_query` from its attention layer, in
    either order, once a chunk.
    """

    _positions: torch.Tensor | None = None

    def __init__(self, buffers: PrefillBuffers) -> None:
        self._buffers = buffers
        self._window = buffers.window_queries[: buffers.window]
        self.keys_only = False
        self._num_rows = 0
        self._start = 0
        self._end = 0

    @property
    def has_gaps(self) -> bool:
        """Whether the layer's window is to go by position: see `attend_window`."""
        return self._positions is not None

    def start_layer(self, num_rows: int, *, keys_only: bool = False) -> None:
        """A layer begins that ``num_rows`` tokens will pass.

        ``keys_only``: nothing comes after it, so the attention layer may raise
        `KeysTaken` once keys, values and queries are here.
        """
        self._num_rows = num_rows
        self.keys_only = keys_only

    def start_chunk(
        self, start: int, end: int, positions: torch.Tensor | None = None
    ) -> None:
        """Rows ``[start, end)`` pass next.

        ``positions`` [num_rows] where a layer with a sliding window gets rows with gaps
        between them.
        """
        self._start, self._end = start, end
        self._positions = positions

    def on_kv(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the chunk's keys [n, Hkv, D] and values [n, Hkv, Dv]."""
        n = self._end - self._start
        self._buffers.keys[self._start : self._end].copy_(key[:n])
        self._buffers.values[self._start : self._end].copy_(value[:n])

    def on_query(self, query: torch.Tensor) -> None:
        """Takes the chunk's queries [n, H, D]; keeps those of the window."""
        window = self._window
        first = self._num_rows - window.shape[0]
        begin = max(self._start, first)
        if begin >= self._end:
            return
        n = self._end - self._start
        window[begin - first : self._end - first].copy_(query[begin - self._start : n])

    def attend_window(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        window: int,
        scale: float,
    ) -> None:
        """The chunk's attention to the rows so far, in place of the engine's kernel.

        That counts the window in rows: where some are missing it reaches too far.

        Args:
            query: [n, H, D], rows behind the chunk's ignored.
            output: Receives [n, H, Dv], in any shape of as many elements a row.
            window: Positions that a token sees, its own included.
            scale: The factor on q k^T.
        """
        assert self._positions is not None
        n = self._end - self._start
        values = self._buffers.values[: self._end]
        attention_at(
            query[:n],
            self._buffers.keys[: self._end],
            values,
            self._positions[self._start : self._end],
            self._positions[: self._end],
            scale=scale,
            out=output[:n].view(n, query.shape[1], values.shape[2]),
            window=window,
        )


class PackTap(LayerTap):
    """The same of several prompts, whose rows all pass at once, one after another."""

    def __init__(self, buffers: PrefillBuffers) -> None:
        super().__init__(buffers)
        self._last: torch.Tensor | None = None
        self._ranges: Sequence[tuple[int, int]] = ()

    def start_pack(
        self,
        ranges: Sequence[tuple[int, int]],
        window_rows: torch.Tensor,
        *,
        keys_only: bool,
    ) -> None:
        """A layer begins that these ranges of rows will pass at once.

        ``window_rows`` int64 [prompts * W]: of those that pass, the last W of each
        prompt.
        """
        self.keys_only = keys_only
        self._ranges = ranges
        self._last = window_rows

    def on_kv(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the keys [n, Hkv, D] and values [n, Hkv, Dv]."""
        passed = 0
        for start, end in self._ranges:
            n = end - start
            self._buffers.keys[start:end].copy_(key[passed : passed + n])
            self._buffers.values[start:end].copy_(value[passed : passed + n])
            passed += n

    def on_query(self, query: torch.Tensor) -> None:
        """Takes the queries [n, H, D]; keeps those of each prompt's window."""
        assert self._last is not None
        window = self._buffers.window_queries[: len(self._last)]
        window.copy_(gather_tokens(query.flatten(1), self._last).view(window.shape))
