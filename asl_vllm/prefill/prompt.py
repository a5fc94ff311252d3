"""One prompt on its way through the layers: what enters each, and what it keeps."""

from __future__ import annotations

import time

import numpy as np
import torch

from asl_kernels.gather_kept import gather_kept
from asl_vllm.prefill.advancing import Advancing
from asl_vllm.prefill.buffers import PrefillBuffers, Rows
from asl_vllm.prefill.job import PrefillJob, PrefillProgress
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.tables import BlockTables
from asl_vllm.selection.deciding import FiniteCheck, Reading, deciding
from asl_vllm.selection.device import on_device
from asl_vllm.selection.policies import Keep, LayerDecision, Policy

_ALL = LayerDecision(Keep.ALL)

Scores = tuple[torch.Tensor, torch.Tensor]
"""Of each KV head, and their sum; see `Policy.score`."""


class Prompt(Advancing):
    """A `PrefillJob` between two layers, and what becomes of it after each.

    Effects: writes the kept keys and values of each finished layer to the job's slots
    of the KV pool.
    """

    def __init__(
        self,
        job: PrefillJob,
        model: DecoderModel,
        policy: Policy,
        buffers: PrefillBuffers,
    ) -> None:
        if job.num_prompt_tokens > buffers.capacity:
            raise ValueError(
                f"prompt of {job.num_prompt_tokens} tokens exceeds the prefill "
                f"buffers ({buffers.capacity} tokens); raise max_prefill_tokens."
            )
        super().__init__()
        self.job = job
        self._model = model
        self._policy = policy
        self._buffers = buffers.part(0, 0)
        self._layer = 0
        self._num_rows = job.num_prompt_tokens
        self._written_layers = 0
        self._selection_layer: int | None = None
        shape = model.shape
        self._windows = shape.windows or (None,) * shape.num_layers
        self._scored = {layer: i for i, layer in enumerate(shape.scored_layers)}
        self._tables = BlockTables(job, shape)
        self._deeper: torch.Tensor | None = None
        self._finite = FiniteCheck()
        self._started = time.perf_counter()
        device = model.shape.device
        # By way of numpy, which reads an array's memory instead of its numbers.
        token_ids = np.asarray(job.prompt_token_ids, dtype=np.int64)
        self._token_ids = on_device(torch.from_numpy(token_ids), device)
        self._positions = torch.arange(job.num_prompt_tokens, device=device)
        self._slots = on_device(job.slots(), device)
        self._window_slots = [on_device(slots, device) for slots in job.window_slots()]

    @property
    def done(self) -> bool:
        """Whether every layer's kept tokens are in the KV pool."""
        return self._layer == self._model.shape.num_layers

    @property
    def layer(self) -> int:
        """The layer that runs next."""
        return self._layer

    @property
    def num_rows(self) -> int:
        """Rows that enter it."""
        return self._num_rows

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

    @property
    def progress(self) -> PrefillProgress:
        """How far it is."""
        return PrefillProgress(self._layer, self._selection_layer)

    def lend(self, rows: Rows) -> None:
        """Its rows are there from now on: it shares the buffers with others."""
        self._buffers = rows

    @property
    def asks(self) -> bool:
        """Whether the policy is asked about the layer.

        Where tokens are selected but are yet to be left behind, nothing is asked; and
        a layer of k tokens keeps them all. One with a sliding window keeps the newest.
        """
        scored = self._windows[self._layer] is None
        return scored and self._deeper is None and self._num_rows > self.job.kept_tokens

    def score(self) -> Scores | None:
        """What the policy scores the layer's tokens; see `Policy.score`."""
        return self._policy.score(
            self._scored[self._layer],
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
                self._scored[self._layer],
                self._num_rows,
                layer_score,
                head_scores,
                self._finite,
                named=self._layer,
            )
        )

    def keep_and_send_deeper(self, decision: LayerDecision = _ALL) -> None:
        """Writes what the layer keeps and leaves the tokens that go deeper."""
        layer = self._layer
        keys = self._buffers.keys[: self._num_rows]
        values = self._buffers.values[: self._num_rows]
        if self._tables.keeps_all or decision.kept is Keep.ALL:
            self._write(keys, values)
        elif isinstance(decision.kept, torch.Tensor):
            self._write(*gather_kept(keys, values, decision.kept))
        self._layer += 1
        if isinstance(decision.deeper, torch.Tensor):
            if self._selection_layer is None:
                self._selection_layer = layer
            if decision.restart:
                self._restart(decision.deeper)
            else:
                self._deeper = decision.deeper
        if self._tables.may_leave(layer):
            self._go_deeper(layer)

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # The last row is the last prompt token: the engine's own step computes it.
        keys, values = keys[:-1], values[:-1]
        row, window = self._tables.row(self._layer), self._windows[self._layer]
        if window is None:
            slots = self._slots[row]
        else:
            # What the next token sees beside itself; no rows are missing there.
            newest = min(len(keys), window - 1)
            keys, values = keys[len(keys) - newest :], values[len(values) - newest :]
            slots = self._window_slots[row]
        slots = slots[len(slots) - len(keys) :]
        self._model.write_kept(self._layer, keys, values, slots)
        self._written_layers += 1

    def _go_deeper(self, layer: int) -> None:
        """Leaves only the selected tokens, at their positions, if any were selected."""
        if self._deeper is None:
            return
        self._buffers.hidden.keep(self._deeper, self._num_rows)
        self._positions = self._positions[self._deeper]
        self._num_rows = len(self._deeper)
        self._deeper = None
        self._tables.left(layer)

    def _restart(self, tokens: torch.Tensor) -> None:
        """Starts over with these tokens as a prompt that ends where this one does."""
        self._token_ids = self._token_ids[tokens]
        self._num_rows = len(tokens)
        self._positions = torch.arange(
            self.job.num_prompt_tokens - len(tokens),
            self.job.num_prompt_tokens,
            device=self._positions.device,
        )
        self._layer = 0
        self._written_layers = 0

    def ending(self) -> Reading[None]:
        """After the last layer, looks at what is still to be looked at.

        Raises:
            SelectionError: Scores were not finite.
        """
        if self.done:
            assert self._written_layers == self._layer
            yield from self._finite.read()
