"""Reads keys and values out of blocks of the KV pool, however a backend packs them."""

from __future__ import annotations

from collections.abc import Callable

import torch

_DIGIT = 128
"""Whole numbers below it are exact in every dtype of activations."""

Write = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes the keys and values of one block's rows to a page."""


class PoolRows:
    """Where a block holds each element of its rows.

    Found once, by having the backend write numbered rows to a page of its layout.

    Args:
        page: One page of no other use, in the pool's layout and dtype.
        keys: Sizes of one block's keys: rows, heads, elements.
        values: The same of its values.
        dtype: The activations' dtype.
        write: Writes rows of these sizes to ``page``.
    """

    def __init__(
        self,
        page: torch.Tensor,
        keys: tuple[int, int, int],
        values: tuple[int, int, int],
        dtype: torch.dtype,
        write: Write,
    ) -> None:
        self._keys, self._values = keys, values
        counts = [size[0] * size[1] * size[2] for size in (keys, values)]
        # From 1 on, since the page may have elements that no row takes: they stay 0.
        numbers = torch.arange(1, sum(counts) + 1, device=page.device)
        found = torch.zeros(page.numel(), dtype=torch.int64, device=page.device)
        weight = 1
        while weight <= sum(counts):
            digits = (numbers // weight % _DIGIT).to(dtype)
            ours, theirs = digits.split(counts)
            page.zero_()
            write(ours.view(keys), theirs.view(values))
            found += page.reshape(-1).long() * weight
            weight *= _DIGIT
        places = torch.full((sum(counts) + 1,), -1, device=page.device)
        places[found] = torch.arange(page.numel(), device=page.device)
        assert bool((places[1:] >= 0).all()), "a row was not written to the page"
        self._key_places, self._value_places = places[1:].split(counts)

    def rows_of(
        self,
        pages: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values in the rows of ``pages`` [n, ...].

        They go into ``keys`` and ``values`` where given: without gaps, of their dtype.
        """
        flat = pages.reshape(len(pages), -1)

        def taken(places: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            into = None if out is None else out.view(len(flat), -1)
            return torch.index_select(flat, 1, places, out=into)

        return (
            taken(self._key_places, keys).view(-1, *self._keys[1:]),
            taken(self._value_places, values).view(-1, *self._values[1:]),
        )
