"""Prompts of few rows that go through the layers together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch

from asl_vllm.prefill.advancing import Advancing
from asl_vllm.prefill.agreement import agreed, digest_of, unexchanged
from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.passes import Prefill
from asl_vllm.prefill.prefix import load_together
from asl_vllm.prefill.rerun import Rerun, rerun_together
from asl_vllm.prefill.scoring import PackScores
from asl_vllm.prefill.tap import PackTap
from asl_vllm.selection.deciding import read_together
from asl_vllm.selection.device import on_device
from asl_vllm.selection.policies import LayerDecision


class Pack(Advancing):
    """Several prefills whose rows pass a layer at once, one prompt's after another's.

    A pass is a whole layer of all of them, so all are at one layer; those that start
    over wait for the others to end, and where tokens of cached prefixes go deeper all
    wait for these tokens' reruns, a pass a layer. What becomes of a prompt is what
    becomes of it alone, but for the rounding of the model's products.

    An error of one is an error of the pack: who runs it runs those left anew, each
    alone. Then none but its own ends with it.

    Args:
        prefills: Not begun. Together they fit into the buffers, cached prefixes
            included, and what passes of them fits into a chunk.
        model: That of all of them.
        buffers: Theirs.
    """

    def __init__(
        self, prefills: Sequence[Prefill], model: DecoderModel, buffers: PrefillBuffers
    ) -> None:
        super().__init__()
        assert 1 <= len(prefills) <= buffers.packed
        self._model = model
        self._buffers = buffers
        self._tap = PackTap(buffers)
        self._passing = list(prefills)
        self._starting_over: list[Prefill] = []
        self._ended: list[Prefill] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        self._ranges: list[tuple[int, int]] = []
        self._scores = PackScores(model, buffers)
        self._window_rows = torch.empty(0, dtype=torch.int64)
        self._positions = torch.empty(0, dtype=torch.int64)

    @property
    def prefills(self) -> list[Prefill]:
        """Those that have not ended."""
        return [*self._passing, *self._starting_over]

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return not self.prefills

    @property
    def next_cost(self) -> int:
        """Token-layers of the pass that runs next."""
        if reruns := self._reruns:
            return sum(rerun.num_rows for rerun in reruns.values())
        return sum(map(_computed, self._passing or self.prefills))

    @property
    def _reruns(self) -> dict[str, Rerun]:
        """What runs before the next layer, by request id."""
        return {
            prefill.job.request_id: prefill.rerun
            for prefill in self._passing
            if prefill.rerun is not None
        }

    def drop(self, request_id: str) -> bool:
        """Ends one without a result; whether it was there."""
        before = len(self.prefills)
        for some in (self._passing, self._starting_over):
            some[:] = [p for p in some if p.job.request_id != request_id]
        return len(self.prefills) < before

    def take_ended(self) -> list[Prefill]:
        """Those that ended since the last call, in order."""
        ended, self._ended = self._ended, []
        return ended

    def _run_pass(self) -> None:
        self.computed_token_layers += self.next_cost
        if not self._passing:
            self._passing, self._starting_over = self._starting_over, []
            self._places = {}
        if reruns := self._reruns:
            self._run_again(reruns)
            return
        with unexchanged(self._model):
            lengths = self._arrange()
        for prefill in self._passing:
            prefill.begin_layer()
        layer = self._passing[0].layer
        last = layer == self._model.shape.num_layers - 1
        computed = [_computed(prefill) for prefill in self._passing]
        loaded = [prefill.prefix.rows for prefill in self._passing]
        if any(loaded):
            prefixes = [prefill.prefix for prefill in self._passing]
            known = [prefill.known() for prefill in self._passing]
            with unexchanged(self._model):
                load_together(self._model, layer, prefixes, known, computed)
        else:
            loaded = []
        self._tap.start_pack(self._ranges, self._window_rows, keys_only=last)
        hidden = self._buffers.hidden.load_several(self._ranges)
        self._model.run_layer(
            layer, self._positions, hidden, 0, self._tap, computed, loaded
        )
        if not last:
            self._buffers.hidden.store_several(self._ranges, hidden)
        for prefill in self._passing:
            prefill.passed()
        self._finish_layer(lengths)
        self._leave_layer()

    def _run_again(self, reruns: Mapping[str, Rerun]) -> None:
        """A layer of what runs again; all rows stay where they are."""
        again = [p for p in self._passing if p.job.request_id in reruns]
        for prefill in again:
            prefill.count_rerun(reruns[prefill.job.request_id].num_rows)
        firsts = [self._places[name][0] for name in reruns]
        ranges = [
            (first, first + rerun.num_rows)
            for first, rerun in zip(firsts, reruns.values(), strict=True)
        ]
        known = [prefill.known() for prefill in again]
        with unexchanged(self._model):
            rerun_together(
                list(reruns.values()),
                known,
                ranges,
                self._model,
                self._buffers.hidden,
            )
        for prefill in again:
            prefill.leave_rerun()

    def _arrange(self) -> list[int]:
        """Rows of each, which then lie one after the other, without gaps.

        Those of a cached prefix are among them.
        """
        lengths = [prefill.num_rows for prefill in self._passing]
        loaded = [prefill.prefix.rows for prefill in self._passing]
        names = [prefill.job.request_id for prefill in self._passing]
        ends = list(accumulate(lengths))
        firsts = [end - length for end, length in zip(ends, lengths, strict=True)]
        rows = zip(firsts, lengths, loaded, strict=True)
        places = dict(zip(names, rows, strict=True))
        if self._places == places:
            return lengths
        device = self._model.shape.device
        before = self._places or places
        if any(before[name][0] != place[0] for name, place in places.items()):
            moved = [
                torch.arange(length) + before[name][0]
                for name, length in zip(names, lengths, strict=True)
            ]
            kept = on_device(torch.cat(moved), device)
            self._buffers.hidden.keep(kept, int(moved[-1][-1]) + 1)
        self._places = places
        window = torch.arange(-self._buffers.window, 0)
        last = [end + window for end in accumulate(map(_computed, self._passing))]
        self._window_rows = on_device(torch.cat(last), device)
        for index, prefill in enumerate(self._passing):
            prefill.lend(self._buffers.part(firsts[index], index))
        self._positions = torch.cat(
            [prefill.positions[prefill.prefix.rows :] for prefill in self._passing]
        )
        self._ranges = _joined(
            (first + behind, end)
            for first, behind, end in zip(firsts, loaded, ends, strict=True)
        )
        return lengths

    def _finish_layer(self, lengths: list[int]) -> None:
        asking = [prefill for prefill in self._passing if prefill.asks]
        with unexchanged(self._model):
            for prefill in self._passing:
                if not prefill.asks:
                    prefill.keep_and_send_deeper()
        if not asking:
            return
        with agreed(self._model) as brought:
            scores = self._scores.of(asking, self._passing, lengths)
            decisions = read_together(
                prefill.deciding(own)
                for prefill, own in zip(asking, scores, strict=True)
            )
            if self._model.num_ranks > 1:
                brought.digest = _digest(decisions)
            for prefill, decision in zip(asking, decisions, strict=True):
                prefill.keep_and_send_deeper(decision)

    def _leave_layer(self) -> None:
        """Sorts out those that have ended and those that start over."""
        read_together(prefill.ending() for prefill in self._passing)
        layer = max(prefill.layer for prefill in self._passing)
        passing, self._passing = self._passing, []
        for prefill in passing:
            if prefill.done:
                self._ended.append(prefill)
            elif prefill.layer == layer:
                self._passing.append(prefill)
            else:
                self._starting_over.append(prefill)


def _computed(prefill: Prefill) -> int:
    """Rows of the next layer that pass it; those of a cached prefix do not."""
    return prefill.num_rows - prefill.prefix.rows


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch, as one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _digest(decisions: Sequence[LayerDecision]) -> bytes:
    """Of the tokens that go deeper, of each prompt."""
    parts = [
        digest_of(decision.deeper) if isinstance(decision.deeper, torch.Tensor) else b""
        for decision in decisions
    ]
    if not any(parts):
        return b""
    return hashlib.sha256(b"".join(part.ljust(32) for part in parts)).digest()
