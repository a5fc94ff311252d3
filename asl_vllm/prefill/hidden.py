"""The hidden states of a prompt between its layers, on the device or in host memory."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from asl_kernels.gather_kept import gather_tokens
from asl_vllm.prefill.shape import ModelShape

Ranges = Sequence[tuple[int, int]]
"""Ranges ``[start, end)`` of rows, ascending."""

_MOVED_AT_ONCE = 4096
"""Rows that the device moves at once, which bounds the memory that moving takes."""


class HiddenStates(abc.ABC):
    """Rows [capacity, E] in the activations' dtype; one owner at a time.

    A pass takes its rows with `load`, changes them in place on the device and
    gives them back with `store`.
    """

    device_bytes = 0
    host_bytes = 0

    def load(self, start: int, end: int) -> Tensor:
        """Rows ``[start, end)`` on the device [end - start, E], good until `store`."""
        return self.load_several([(start, end)])

    @abc.abstractmethod
    def store(self, start: int, rows: Tensor) -> None:
        """Puts ``rows`` back as the rows from ``start`` on."""

    @abc.abstractmethod
    def load_several(self, ranges: Ranges) -> Tensor:
        """As `load`, of several ranges; their rows one after another."""

    def store_several(self, ranges: Ranges, rows: Tensor) -> None:
        """Puts back what `load_several` gave."""
        lengths = [end - start for start, end in ranges]
        for (start, _), part in zip(ranges, torch.split(rows, lengths), strict=True):
            self.store(start, part)

    @abc.abstractmethod
    def keep(self, kept: Tensor, num_rows: int, first: int = 0) -> None:
        """Row i becomes row ``kept[i]`` of ``num_rows`` rows, from ``first`` on.

        ``kept``: int64 [k] on the device, strictly ascending.
        """


class HiddenPart(HiddenStates):
    """Rows of others from ``first`` on, as rows from 0 on."""

    def __init__(self, whole: HiddenStates, first: int) -> None:
        self._whole = whole
        self._first = first

    def store(self, start: int, rows: Tensor) -> None:
        """See `HiddenStates.store`."""
        self._whole.store(self._first + start, rows)

    def load_several(self, ranges: Ranges) -> Tensor:
        """See `HiddenStates.load_several`."""
        first = self._first
        return self._whole.load_several([(first + a, first + b) for a, b in ranges])

    def keep(self, kept: Tensor, num_rows: int, first: int = 0) -> None:
        """See `HiddenStates.keep`."""
        self._whole.keep(kept, num_rows, self._first + first)


class DeviceHidden(HiddenStates):
    """On the device, where a pass changes them without a copy."""

    def __init__(self, shape: ModelShape, capacity: int) -> None:
        self._rows = torch.zeros(
            (capacity, shape.hidden_size), dtype=shape.dtype, device=shape.device
        )
        self.device_bytes = self._rows.nbytes

    def load_several(self, ranges: Ranges) -> Tensor:
        """See `HiddenStates.load_several`: a view of one range, a copy of more."""
        parts = [self._rows[start:end] for start, end in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def store(self, start: int, rows: Tensor) -> None:
        """See `HiddenStates.store`; a view that `load` gave is here already."""
        own = self._rows[start : start + len(rows)]
        if own.data_ptr() != rows.data_ptr():
            own.copy_(rows)

    def keep(self, kept: Tensor, num_rows: int, first: int = 0) -> None:
        """See `HiddenStates.keep`."""
        _move_up(self._rows[first : first + num_rows], kept, _MOVED_AT_ONCE)


class HostHidden(HiddenStates):
    """In host memory, pinned where the device is a GPU, and staged chunk by chunk.

    Copies are issued on the current stream, in order with the passes around them.
    """

    def __init__(self, shape: ModelShape, capacity: int, chunk_tokens: int) -> None:
        self._rows = torch.zeros(
            (capacity, shape.hidden_size),
            dtype=shape.dtype,
            pin_memory=shape.device.type == "cuda",
        )
        self._stage = torch.zeros(
            (min(chunk_tokens, capacity), shape.hidden_size),
            dtype=shape.dtype,
            device=shape.device,
        )
        self.device_bytes = self._stage.nbytes
        self.host_bytes = self._rows.nbytes

    def load_several(self, ranges: Ranges) -> Tensor:
        """See `HiddenStates.load_several`: rows of the staging buffer."""
        ends = list(accumulate(end - start for start, end in ranges))
        for (start, end), last in zip(ranges, ends, strict=True):
            stage = self._stage[last - (end - start) : last]
            stage.copy_(self._rows[start:end], non_blocking=True)
        return self._stage[: ends[-1]]

    def store(self, start: int, rows: Tensor) -> None:
        """See `HiddenStates.store`."""
        own = self._rows[start : start + len(rows)]
        own.copy_(rows, non_blocking=True)

    def keep(self, kept: Tensor, num_rows: int, first: int = 0) -> None:
        """See `HiddenStates.keep`."""
        # Waits for the stream, and so for every `store` before it.
        kept = kept.to("cpu")
        _move_up(self._rows[first : first + num_rows], kept, len(self._stage))


def _move_up(rows: Tensor, kept: Tensor, at_once: int) -> None:
    """Row i becomes row ``kept[i]``, in parts of ``at_once`` rows."""
    # Ascending: a row comes from its own place or a later one, so parts that are
    # moved in order overwrite nothing that is still needed.
    for start in range(0, len(kept), at_once):
        part = kept[start : start + at_once]
        rows[start : start + len(part)] = gather_tokens(rows, part)
