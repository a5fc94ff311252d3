"""Greedy answers after many caches at once: a token of all of them in each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asl_vllm_testing.oracle.model import TinyDecoder

Cache = list[tuple[Tensor, Tensor]]
"""Of each layer the keys and values, each [entries, Hkv, D]."""
_STEP = 128
"""Caches whose numbers of entries differ by less may lie side by side."""


class _Group:
    """Caches of about one size side by side: of a layer [n, Hkv, room, D]."""

    def __init__(self, numbers: Sequence[int], caches: Sequence[Cache], more: int):
        """``numbers``: which of the answers they are of; ``more``: tokens to come."""
        self.numbers = list(numbers)
        self.sizes = [len(cache[0][0]) for cache in caches]
        assert all(
            len(keys) == size
            for cache, size in zip(caches, self.sizes, strict=True)
            for keys, _ in cache
        )
        device = caches[0][0][0].device
        self._rows = torch.arange(len(caches), device=device)
        self._ends = torch.tensor(self.sizes, device=device)
        room = max(self.sizes) + more
        self._layers = [
            (_side_by_side(keys, room), _side_by_side(values, room))
            for keys, values in (
                zip(*layer, strict=True) for layer in zip(*caches, strict=True)
            )
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A token [n, H, D] of each after what is there and itself, which stays."""
        keys, values = self._layers[layer]
        keys[self._rows, :, self._ends], values[self._rows, :, self._ends] = k, v
        seen = max(self.sizes) + 1
        keys, values = keys[:, :, :seen], values[:, :, :seen]
        count, heads, dim = k.shape
        grouped = q.reshape(count, heads, -1, dim) * dim**-0.5
        logits = grouped @ keys.transpose(-1, -2)
        later = torch.arange(seen, device=q.device) > self._ends[:, None]
        logits.masked_fill_(later[:, None, None], -math.inf)
        mixed: Tensor = logits.float().softmax(-1).to(v.dtype) @ values
        return mixed.flatten(1, 2)

    def stepped(self) -> None:
        """Each has one more entry in every layer."""
        self.sizes = [size + 1 for size in self.sizes]
        self._ends += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets the others."""
        index = torch.tensor(rows, device=self._ends.device)
        self.numbers = [self.numbers[row] for row in rows]
        self.sizes = [self.sizes[row] for row in rows]
        self._rows, self._ends = self._rows[: len(rows)], self._ends[index]
        self._layers = [(keys[index], values[index]) for keys, values in self._layers]


def _side_by_side(parts: Sequence[Tensor], room: int) -> Tensor:
    _, heads, dim = parts[0].shape
    whole = parts[0].new_zeros(len(parts), heads, room, dim)
    for own, part in zip(whole, parts, strict=True):
        own[:, : len(part)] = part.transpose(0, 1)
    return whole


class _Batch(TinyDecoder):
    """Runs a token of each cache of all groups, one group's after another's."""

    def __init__(self, model: TinyDecoder, groups: list[_Group]) -> None:
        super().__init__(model.config, model.weights)
        self.groups = groups
        self.at = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `TinyDecoder.attend`; each token sees its own cache."""
        sizes = [len(group.numbers) for group in self.groups]
        parts = zip(*(torch.split(part, sizes) for part in (q, k, v)), strict=True)
        pairs = zip(self.groups, parts, strict=True)
        return torch.cat([group.attend(self.at, *own) for group, own in pairs])

    def step(self, tokens: list[int], positions: list[int]) -> list[int]:
        """The likeliest token after each."""
        device = self.embedding.device
        hidden = self.embed(torch.tensor(tokens, device=device))
        places = torch.tensor(positions, device=device)
        for layer in range(self.config.num_layers):
            self.at = layer
            hidden = self.layer(layer, hidden, places).hidden
        for group in self.groups:
            group.stepped()
        found: list[int] = self.logits(hidden).argmax(-1).tolist()
        return found


def finish(
    model: TinyDecoder,
    caches: Sequence[Cache],
    answers: Sequence[list[int]],
    ends: Sequence[int],
    max_tokens: int,
    eos: int | None,
) -> None:
    """Adds greedy tokens to each answer until it has ``eos``, or ``max_tokens``.

    ``caches``: of all tokens before an answer's last, whatever was kept of them.
    ``ends``: the position of the last token before each answer. Answers are not empty.
    """

    def going(number: int) -> bool:
        answer = answers[number]
        return eos not in answer and len(answer) < max_tokens

    by_size: dict[int, list[int]] = {}
    for number in filter(going, range(len(answers))):
        by_size.setdefault(len(caches[number][0][0]) // _STEP, []).append(number)
    batch = _Batch(
        model,
        [_Group(own, [caches[n] for n in own], max_tokens) for own in by_size.values()],
    )
    while batch.groups:
        numbers = [n for group in batch.groups for n in group.numbers]
        found = batch.step(
            [answers[n][-1] for n in numbers],
            [ends[n] + len(answers[n]) for n in numbers],
        )
        for number, token in zip(numbers, found, strict=True):
            answers[number].append(token)
        for group in batch.groups:
            rows = [row for row, n in enumerate(group.numbers) if going(n)]
            # Moving costs as much as some steps; what ended may go on till then.
            if rows and 2 * len(rows) <= len(group.numbers):
                group.keep(rows)
        batch.groups = [g for g in batch.groups if any(map(going, g.numbers))]
