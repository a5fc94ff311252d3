"""Scores of prompts that pass a layer together, and the best tokens by these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.passes import Prefill
from asl_vllm.prefill.prompt import Scores
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.kept import BestOfEach
from asl_vllm.selection.together import score_together, scores_alike


class PackScores:
    """Has the layers of all prompts scored by as many launches as that of one.

    Args:
        model: Sums scores over its ranks.
        buffers: Hold the prompts' keys, one prompt's after another's, and their
            windows' queries.
    """

    def __init__(self, model: DecoderModel, buffers: PrefillBuffers) -> None:
        self._model = model
        self._buffers = buffers
        self._best: tuple[Any, BestOfEach | None] = None, None

    def of(
        self,
        asking: Sequence[Prefill],
        passing: Sequence[Prefill],
        lengths: Sequence[int],
    ) -> list[Scores | None]:
        """Scores of those that ask, the layers' summed over ranks.

        ``passing``: all whose rows are there, ``lengths`` of each.
        """
        if self._model.num_ranks == 1:
            return self._own(asking, passing, lengths)
        columns = [prefill.scored_rows for prefill in asking]
        scores: list[Scores | None] = [None] * len(asking)
        try:
            scores = self._own(asking, passing, lengths)
        finally:
            # Other ranks sum scores, if this one failed: it joins them.
            device = self._model.shape.device
            layer_scores = [
                torch.zeros(n, dtype=torch.float32, device=device)
                if own is None
                else own[1]
                for own, n in zip(scores, columns, strict=True)
            ]
            together = self._model.sum_over_ranks(torch.cat(layer_scores))
            summed = torch.split(together, columns)
        return [
            None if own is None else (own[0], layer_score)
            for own, layer_score in zip(scores, summed, strict=True)
        ]

    def _own(
        self,
        asking: Sequence[Prefill],
        passing: Sequence[Prefill],
        lengths: Sequence[int],
    ) -> list[Scores | None]:
        """Of this rank's heads."""
        alike = [prefill for prefill in asking if scores_alike(prefill.policy)]
        found: dict[str, Scores | None] = {}
        if len(alike) > 1:
            # All that pass are scored, since their keys lie between the others'.
            together = score_together(
                alike[0].policy.config,
                self._buffers.window_queries[: len(passing) * self._buffers.window],
                self._buffers.keys[: sum(lengths)],
                lengths,
                self._model.attention_scale(alike[0].layer),
            )
            wanted = {prefill.job.request_id for prefill in alike}
            kept = [prefill.job.kept_tokens for prefill in passing]
            counts = [min(n, k) for n, k in zip(lengths, kept, strict=True)]
            best = self._best_of_each(lengths, counts)([own[0] for own in together])
            for prefill, own, tokens in zip(passing, together, best, strict=True):
                if prefill.job.request_id in wanted:
                    found[prefill.job.request_id] = own
                    prefill.policy.take_best(own[0], tokens)
        for prefill in asking:
            if prefill.job.request_id not in found:
                found[prefill.job.request_id] = _checked(prefill, prefill.score())
        return [found[prefill.job.request_id] for prefill in asking]

    def _best_of_each(
        self, lengths: Sequence[int], counts: Sequence[int]
    ) -> BestOfEach:
        """Made once for layers that are alike."""
        key = tuple(lengths), tuple(counts)
        known, best = self._best
        if best is None or known != key:
            tail, device = self._buffers.window, self._model.shape.device
            best = BestOfEach([n - tail for n in lengths], counts, tail, device)
            self._best = key, best
        return best


def _checked(prefill: Prefill, scores: Scores | None) -> Scores | None:
    """Scores that can be summed with those of others."""
    if scores is not None and scores[1].shape != (prefill.scored_rows,):
        raise SelectionError(
            f"layer {prefill.layer}: the layer score of "
            f"{type(prefill.policy).__name__} does not fit the layer."
        )
    return scores
