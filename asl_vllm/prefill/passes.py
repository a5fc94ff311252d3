"""One prompt's layer-major prefill, advanced in bounded passes."""

from __future__ import annotations

import time

import numpy as np
import torch

from asl_kernels.gather_kept import gather_kept
from asl_vllm.prefill.advancing import Advancing
from asl_vllm.prefill.agreement import (
    RanksDifferError,
    agreed,
    digest_of,
    unexchanged,
)
from asl_vllm.prefill.bands import Bands
from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.job import PrefillJob, PrefillProgress, PrefillReport
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.prefix import CachedPrefix, Rerun
from asl_vllm.prefill.tap import LayerTap
from asl_vllm.selection.deciding import (
    FiniteCheck,
    Reading,
    deciding,
    read_together,
)
from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.policies import Keep, LayerDecision, Policy

_ALL = LayerDecision(Keep.ALL)


Scores = tuple[torch.Tensor, torch.Tensor]
"""Of each KV head, and their sum; see `Policy.score`."""


def on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. Does not wait for it."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


class Prefill(Advancing):
    """Runs a `PrefillJob`. A pass is one chunk of tokens through one layer.

    Owns the contents of the buffers it was lent until `done`. Effects: writes the
    kept keys and values of each finished layer to the job's slots of the KV pool.
    Chunks only bound the work of a pass; they do not change the result.
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
        if job.num_prompt_tokens > buffers.capacity:
            raise ValueError(
                f"prompt of {job.num_prompt_tokens} tokens exceeds the prefill "
                f"buffers ({buffers.capacity} tokens); raise max_prefill_tokens."
            )
        super().__init__()
        rows = job.num_prompt_tokens
        assert job.reused_tokens <= max(0, rows - policy.tail), "no window is computed"
        self.job = job
        self._model = model
        self._policy = policy
        self._buffers = buffers
        self._tap = LayerTap(buffers)
        self._chunk_tokens = chunk_tokens
        self._layer = 0
        self._row = 0
        self._num_rows = job.num_prompt_tokens
        self._written_layers = 0
        self._selection_layer: int | None = None
        self._bands = Bands(model.shape.num_layers, job.bands)
        self._pruned_bands = 0 if job.keep_shallow else job.bands
        self._deeper: torch.Tensor | None = None
        self._prefix = CachedPrefix(job, model, self._bands)
        self._rerun: Rerun | None = None
        self._finite = FiniteCheck()
        self._reused_token_layers = 0
        self._rerun_token_layers = 0
        self._started = time.perf_counter()
        device = model.shape.device
        # By way of numpy, which reads an array's memory instead of its numbers.
        token_ids = np.asarray(job.prompt_token_ids, dtype=np.int64)
        self._token_ids = on_device(torch.from_numpy(token_ids), device)
        self._positions = torch.arange(job.num_prompt_tokens, device=device)
        self._slots = on_device(job.slots(), device)

    @property
    def done(self) -> bool:
        """Whether every layer's kept tokens are in the KV pool."""
        return self._layer == self._model.shape.num_layers

    @property
    def _keeps_all(self) -> bool:
        """Whether layers keep every token: so far no band lacks the pruned ones."""
        return not self._pruned_bands

    @property
    def progress(self) -> PrefillProgress:
        """How far it is."""
        return PrefillProgress(self._layer, self._selection_layer)

    @property
    def next_cost(self) -> int:
        """Token-layers of the pass that runs next."""
        if self._rerun is not None:
            return self._rerun.next_rows(self._chunk_tokens)
        row = max(self._row, self._prefix.rows)
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
            pruned_bands=self._pruned_bands,
            reused_tokens=self.job.reused_tokens,
            reused_token_layers=self._reused_token_layers,
            rerun_token_layers=self._rerun_token_layers,
        )

    def _run_pass(self) -> None:
        if self._rerun is not None:
            self._run_again(self._rerun)
            return
        if self._row == 0:
            self.begin_layer()
        if self._row == 0 and self._prefix.rows:
            self._load_prefix()
        start = self._row
        if start == self._prefix.rows:
            last = self._layer == self._model.shape.num_layers - 1
            self._tap.start_layer(self._num_rows, keys_only=last)
        end = min(start + self._chunk_tokens, self._num_rows)
        self._tap.start_chunk(start, end)
        self.computed_token_layers += end - start
        hidden = self._buffers.hidden.load(start, end)
        self._model.run_layer(
            self._layer, self._positions[start:end], hidden, start, self._tap
        )
        if not self._tap.keys_only:
            self._buffers.hidden.store(start, hidden)
        self._row = end
        if end == self._num_rows:
            self._finish_layer()

    # What a `Pack` has each of its prefills do, in place of passes of its own.

    @property
    def layer(self) -> int:
        """The layer that runs next."""
        return self._layer

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the tokens that enter it, one for each row."""
        return self._positions

    @property
    def scored_rows(self) -> int:
        """Rows of the layer that have a score."""
        return self._num_rows - self._policy.tail

    @property
    def policy(self) -> Policy:
        """Decides about this prompt."""
        return self._policy

    def lend(self, buffers: PrefillBuffers) -> None:
        """Its rows are in these from now on."""
        self._buffers = buffers

    def begin_layer(self) -> None:
        """All of the layer's rows pass next: their hidden states are there."""
        if self._layer == 0:
            self._embed()

    def passed(self) -> None:
        """All of the layer's rows have passed it; keys and values are there."""
        self.computed_token_layers += self._num_rows
        self._row = self._num_rows

    def _run_again(self, rerun: Rerun) -> None:
        rows = rerun.next_rows(self._chunk_tokens)
        self.computed_token_layers += rows
        self._rerun_token_layers += rows
        rerun.run_pass(self._model, self._buffers, self._chunk_tokens)
        if rerun.done:
            self._rerun = None

    def _load_prefix(self) -> None:
        self._prefix.load(self._layer, self._buffers)
        self._reused_token_layers += self._prefix.rows
        self._row = self._prefix.rows

    def _embed(self) -> None:
        for start in range(self._prefix.rows, self._num_rows, self._chunk_tokens):
            end = min(start + self._chunk_tokens, self._num_rows)
            ids = self._token_ids[start:end]
            self._buffers.hidden.store(start, self._model.embed(ids))

    def _finish_layer(self) -> None:
        if self.asks:
            self._ask_about_layer()
        else:
            with unexchanged(self._model):
                self.keep_and_send_deeper()
        read_together([self.ending()])

    @property
    def asks(self) -> bool:
        """Whether the policy is asked about the layer.

        Where tokens are selected but a band's end is awaited, nothing is asked; and a
        layer of k tokens keeps them all.
        """
        return self._deeper is None and self._num_rows > self.job.kept_tokens

    def ending(self) -> Reading[None]:
        """After the last layer, looks at what is still to be looked at.

        Raises:
            SelectionError: Scores were not finite.
        """
        if self.done:
            assert self._written_layers == self._layer
            yield from self._finite.read()

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

    def keep_and_send_deeper(self, decision: LayerDecision = _ALL) -> None:
        """Writes what the layer keeps and leaves the tokens that go deeper."""
        layer = self._layer
        keys = self._buffers.keys[: self._num_rows]
        values = self._buffers.values[: self._num_rows]
        if self._keeps_all or decision.kept is Keep.ALL:
            self._write(keys, values)
        elif isinstance(decision.kept, torch.Tensor):
            self._write(*gather_kept(keys, values, decision.kept))
        self._layer += 1
        self._row = 0
        if isinstance(decision.deeper, torch.Tensor):
            if self._selection_layer is None:
                self._selection_layer = layer
            if decision.restart:
                self._restart(decision.deeper)
            else:
                self._deeper = decision.deeper
        # A band has one block table, so where it keeps all tokens they pass all of it.
        if not self._keeps_all or self._bands.ends(layer):
            self._go_deeper(layer)

    def score(self) -> Scores | None:
        """What the policy scores the layer's tokens; see `Policy.score`."""
        return self._policy.score(
            self._layer,
            self._buffers.window_queries,
            self._buffers.keys[: self._num_rows],
            self._model.attention_scale(self._layer),
        )

    def deciding(self, scores: Scores | None) -> Reading[LayerDecision]:
        """What becomes of the layer's tokens, whose sum is over all ranks."""
        if scores is None:
            return LayerDecision(Keep.NONE)
        head_scores, layer_score = scores
        return (
            yield from deciding(
                self._policy,
                self._layer,
                self._num_rows,
                layer_score,
                head_scores,
                self._finite,
            )
        )

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

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # The last row is the last prompt token: the engine's own step computes it.
        keys, values = keys[:-1], values[:-1]
        slots = self._slots[self._bands.of(self._layer), -len(keys) :]
        self._model.write_kept(self._layer, keys, values, slots)
        self._written_layers += 1

    def _go_deeper(self, layer: int) -> None:
        """Leaves only the selected tokens, at their positions, if any were selected."""
        if self._deeper is None:
            return
        # Rows of a cached prefix are of no meaning yet: `Rerun` fills those selected.
        self._buffers.hidden.keep(self._deeper, self._num_rows)
        if self._prefix.rows:
            self._leave_prefix(self._deeper, layer)
        self._positions = self._positions[self._deeper]
        self._num_rows = len(self._deeper)
        self._deeper = None
        if self._keeps_all:
            # 0 after the last band: then no layer follows.
            self._pruned_bands = self._bands.below(layer)

    def _leave_prefix(self, deeper: torch.Tensor, layer: int) -> None:
        """What goes deeper is computed, be it of the prefix; behind all layers nothing.

        Synchronises with the host.
        """
        cached = deeper[deeper < self._prefix.rows]
        if len(cached) and not self.done:
            self._rerun = Rerun(self._prefix, cached, self._token_ids, layer)
        else:
            self._prefix.rows = 0

    def _restart(self, tokens: torch.Tensor) -> None:
        """Starts over with these tokens as a prompt that ends where this one does."""
        self._prefix.rows = 0
        self._token_ids = self._token_ids[tokens]
        self._num_rows = len(tokens)
        self._positions = torch.arange(
            self.job.num_prompt_tokens - len(tokens),
            self.job.num_prompt_tokens,
            device=self._positions.device,
        )
        self._layer = 0
        self._written_layers = 0
