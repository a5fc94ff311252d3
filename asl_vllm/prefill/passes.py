"""One prompt's layer-major prefill, advanced in bounded passes."""

from __future__ import annotations

import time

import torch

from asl_vllm.prefill.agreement import (
    RanksDifferError,
    agreed,
    digest_of,
    unexchanged,
)
from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.job import PrefillJob, PrefillReport
from asl_vllm.prefill.model import DecoderModel, Known
from asl_vllm.prefill.prefix import CachedPrefix
from asl_vllm.prefill.prompt import Prompt
from asl_vllm.prefill.rerun import Rerun
from asl_vllm.prefill.tap import LayerTap
from asl_vllm.selection.deciding import read_together
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.policies import LayerDecision, Policy


class Prefill(Prompt):
    """Runs a `PrefillJob`. A pass is one chunk of tokens through one layer.

    Owns the contents of the buffers it was lent until `done`. Chunks only bound the
    work of a pass; they do not change the result. Several may run together instead, in
    a `Pack`.
    """

    def __init__(
        self,
        job: PrefillJob,
        model: DecoderModel,
        policy: Policy,
        buffers: PrefillBuffers,
        *,
        chunk_tokens: int,
    ) -> None:
        super().__init__(job, model, policy, buffers)
        rows = job.num_prompt_tokens
        assert job.reused_tokens <= max(0, rows - policy.tail), "no window is computed"
        self._tap = LayerTap(buffers)
        self._chunk_tokens = chunk_tokens
        self._row = 0
        self._has_gaps = False
        self.prefix = CachedPrefix(job, model, self._tables)
        self.rerun: Rerun | None = None
        """Runs before the next layer does."""
        self._reused_token_layers = 0
        self._rerun_token_layers = 0

    @property
    def next_cost(self) -> int:
        """Token-layers of the pass that runs next."""
        if self.rerun is not None:
            return self.rerun.next_rows(self._chunk_tokens)
        row = max(self._row, self.prefix.rows)
        return min(self._chunk_tokens, self._num_rows - row)

    def report(self) -> PrefillReport:
        """The outcome, once `done`."""
        full = self.job.num_prompt_tokens * self._model.shape.num_layers
        saved = self._reused_token_layers - self._rerun_token_layers
        return PrefillReport(
            selection_layer=self._selection_layer,
            computed_token_layers=self.computed_token_layers,
            skipped_token_layers=max(0, full - saved - self.computed_token_layers),
            seconds=time.perf_counter() - self._started,
            pruned_bands=self._tables.pruned_bands,
            reused_tokens=self.job.reused_tokens,
            reused_token_layers=self._reused_token_layers,
            rerun_token_layers=self._rerun_token_layers,
        )

    def _run_pass(self) -> None:
        if self.rerun is not None:
            self._run_again(self.rerun)
            return
        if self._row == 0:
            self.begin_layer()
        if self._row == 0 and self.prefix.rows:
            self._load_prefix()
        start = self._row
        if start == self.prefix.rows:
            last = self._layer == self._model.shape.num_layers - 1
            self._tap.start_layer(self._num_rows, keys_only=last)
        end = min(start + self._chunk_tokens, self._num_rows)
        window = self._windows[self._layer]
        self._tap.start_chunk(
            start, end, self._positions if window and self._has_gaps else None
        )
        self.computed_token_layers += end - start
        hidden = self._buffers.hidden.load(start, end)
        self._model.run_layer(
            self._layer, self._positions[start:end], hidden, start, self._tap
        )
        if not self._tap.keys_only:
            self._buffers.hidden.store(start, hidden)
        self._row = end
        if end == self._num_rows:
            self._row = 0
            self._finish_layer()

    # These a `Pack` calls, in place of passes.

    def begin_layer(self) -> None:
        """All of the layer's rows pass next: their hidden states are there."""
        if self._layer == 0:
            self._embed()

    def _embed(self) -> None:
        for start in range(self.prefix.rows, self._num_rows, self._chunk_tokens):
            end = min(start + self._chunk_tokens, self._num_rows)
            hidden = self._model.embed(
                self._token_ids[start:end], self._positions[start:end]
            )
            self._buffers.hidden.store(start, hidden)

    def passed(self) -> None:
        """All of the layer's rows have passed it; keys and values are there."""
        self.computed_token_layers += self._num_rows - self.prefix.rows
        self._reused_token_layers += self.prefix.rows

    def known(self) -> Known:
        """Where its cached prefix is to be loaded."""
        return self.prefix.known(self._buffers)

    def count_rerun(self, rows: int) -> None:
        """So many rows of its rerun pass a layer."""
        self.computed_token_layers += rows
        self._rerun_token_layers += rows

    def leave_rerun(self) -> None:
        """Goes on with the next layer, if that was the last of its rerun."""
        if self.rerun is not None and self.rerun.done:
            self.rerun = None

    def _run_again(self, rerun: Rerun) -> None:
        self.count_rerun(rerun.next_rows(self._chunk_tokens))
        rerun.run_pass(self._model, self._buffers, self._chunk_tokens)
        self.leave_rerun()

    def _load_prefix(self) -> None:
        self.prefix.load(self._layer, self._buffers)
        self._reused_token_layers += self.prefix.rows
        self._row = self.prefix.rows

    def _finish_layer(self) -> None:
        if self.asks:
            self._ask_about_layer()
        else:
            with unexchanged(self._model):
                self.keep_and_send_deeper()
        read_together([self.ending()])

    def _ask_about_layer(self) -> None:
        """Does what the policy decides about the layer, on all ranks or on none."""
        layer = self._layer
        try:
            # Before the next layer, where ranks meet in the model's own collectives.
            with agreed(self._model) as brought:
                decision = self._decide()
                deeper = decision.deeper
                if isinstance(deeper, torch.Tensor) and self._model.num_ranks > 1:
                    brought.digest = digest_of(deeper)
                self.keep_and_send_deeper(decision)
        except RanksDifferError as error:
            raise SelectionError(
                f"layer {layer}: tensor-parallel ranks decided differently about the "
                "tokens that go deeper, so the prompt's cache would not fit together; "
                "their scores must be sums over all ranks."
            ) from error

    def _decide(self) -> LayerDecision:
        scores = None
        try:
            scores = self.score()
        finally:
            # Other ranks sum scores, if this one has none or failed: it joins them.
            if scores is None and self._model.num_ranks > 1:
                nothing = torch.zeros(
                    self.scored_rows,
                    dtype=torch.float32,
                    device=self._model.shape.device,
                )
                self._model.sum_over_ranks(nothing)
        if scores is not None:
            scores = scores[0], self._model.sum_over_ranks(scores[1])
        (decision,) = read_together([self.deciding(scores)])
        return decision

    def _go_deeper(self, layer: int) -> None:
        deeper = self._deeper
        super()._go_deeper(layer)
        # Rows of a cached prefix are of no meaning yet: `Rerun` fills those selected.
        if deeper is None:
            return
        self._has_gaps = True
        if self.prefix.rows:
            self._leave_prefix(deeper, layer)

    def _restart(self, tokens: torch.Tensor) -> None:
        self.prefix.rows = 0
        super()._restart(tokens)

    def _leave_prefix(self, deeper: torch.Tensor, layer: int) -> None:
        """What goes deeper is computed, be it of the prefix; behind all layers nothing.

        Synchronises with the host.
        """
        cached = deeper[deeper < self.prefix.rows]
        if len(cached) and not self.done:
            self.rerun = Rerun(self.prefix, cached, self._token_ids, layer)
        else:
            self.prefix.rows = 0
