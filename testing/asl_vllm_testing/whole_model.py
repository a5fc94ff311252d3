"""The rule on any model of vLLM: its own forward, with attention in plain PyTorch.

All tokens go through all layers, so that nothing here depends on how a pass calls one;
tokens that were left behind are not seen by others, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from asl_vllm_testing.oracle.asl import OracleResult, head_scores, with_window


class WholeModel:
    """A model that an engine has loaded; the engine must be idle."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        self._model = model
        self._config = vllm_config
        found = vllm_config.compilation_config.static_forward_context.values()
        self._attentions: list[Any] = sorted(
            (layer for layer in found if isinstance(layer, Attention)),
            key=lambda layer: extract_layer_index(layer.layer_name),
        )
        # One that is as long as any sequence is none.
        longest = vllm_config.model_config.max_model_len
        self._windows = [
            None
            if (layer.sliding_window or longest) >= longest
            else layer.sliding_window
            for layer in self._attentions
        ]

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        kept: int | None,
        window: int,
        pool_kernel: int,
        selection_layer: int,
        max_tokens: int,
    ) -> OracleResult:
        """Greedy, of a cache with k tokens a layer; ``kept`` None: of all."""
        result = OracleResult()
        newest = max(window, *(w or 0 for w in self._windows))
        run = _Run(kept, window, pool_kernel, selection_layer, newest, result)
        self._forward(torch.tensor(prompt_ids), 0, run.prefill)
        token, position = prompt_ids[-1], len(prompt_ids) - 1
        for _ in range(max_tokens):
            hidden = self._forward(torch.tensor([token]), position, run.decode)
            logprobs = self._model.compute_logits(hidden)[0].float().log_softmax(-1)
            token, position = int(logprobs.argmax()), position + 1
            result.tokens.append(token)
            result.logprobs.append(float(logprobs[token]))
        return result

    def _forward(self, ids: Tensor, start: int, attend: Any) -> Tensor:
        positions = torch.arange(start, start + len(ids))
        with (
            self._attending(attend),
            set_forward_context(
                None, self._config, num_tokens=len(ids), skip_compiled=True
            ),
        ):
            hidden: Tensor = self._model(
                input_ids=ids,
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return hidden

    @contextmanager
    def _attending(self, attend: Any) -> Iterator[None]:
        def method(index: int) -> Any:
            def forward(
                layer: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
            ) -> Tensor:
                output: Tensor = named["output"] if "output" in named else rest[2]
                mixed = attend(index, q, k, v, layer.impl.scale, self._windows[index])
                output.copy_(mixed.reshape(output.shape))
                return output

            return forward

        try:
            for index, layer in enumerate(self._attentions):
                layer.impl.forward = method(index)
            yield
        finally:
            for layer in self._attentions:
                del layer.impl.forward


class _Run:
    """One prompt's attention, and its cache: of each layer k, v [entries, Hkv, D]."""

    def __init__(
        self,
        kept: int | None,
        window: int,
        pool_kernel: int,
        selection_layer: int,
        newest: int,
        result: OracleResult,
    ) -> None:
        self.kept, self.window, self.pool_kernel = kept, window, pool_kernel
        self.newest = newest  # tokens that always go deeper
        self.selection_layer, self.result = selection_layer, result
        self.positions = torch.empty(0, dtype=torch.int64)  # of tokens at this layer
        self.cache: list[tuple[Tensor, Tensor]] = []

    def prefill(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sliding: int | None,
    ) -> Tensor:
        tokens = torch.arange(len(q))
        if layer == 0:
            self.positions = tokens
        positions, heads = self.positions, k.shape[1]
        keep = positions.expand(heads, -1)
        deeper = positions
        if self.kept is not None:
            self.result.layer_tokens.append(len(positions))
            if len(positions) > self.kept and sliding is None:
                queries = q[positions][-self.window :] * (scale * q.shape[-1] ** 0.5)
                scores = head_scores(queries, k[positions], self.pool_kernel)
                top, count = self.kept - self.window, len(positions)
                keep = positions[with_window(scores, top, count)]
                if layer == self.selection_layer:
                    before = count - self.newest
                    layer_scores = scores.sum(0)[:before]
                    deeper = positions[with_window(layer_scores, top, count)]
                    self.result.selection_layer = layer
                    self.result.propagated = deeper
            if sliding is None:
                self.result.kept_per_layer.append(keep)
        # The last token is computed when the answer begins.
        entries = keep[:, :-1].t()[..., None]
        self.cache.append(
            (
                k.gather(0, entries.expand(-1, -1, k.shape[-1])),
                v.gather(0, entries.expand(-1, -1, v.shape[-1])),
            )
        )
        here = torch.zeros(len(q), dtype=torch.bool)
        here[positions] = True
        # A token that is not here sees itself, so that its numbers stay finite.
        itself = torch.eye(len(q), dtype=torch.bool)
        seen = (tokens <= tokens[:, None]) & here | itself
        if sliding is not None:
            seen &= tokens > tokens[:, None] - sliding
        self.positions = deeper
        return _attend(q, k, v, seen, scale)

    def decode(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sliding: int | None,
    ) -> Tensor:
        past_k, past_v = self.cache[layer]
        keys, values = torch.cat([past_k, k]), torch.cat([past_v, v])
        self.cache[layer] = keys, values
        seen = torch.ones(1, len(keys), dtype=torch.bool)
        if sliding is not None:
            # Its newest entries are next to each other: none was left behind.
            seen[:, :-sliding] = False
        return _attend(q, keys, values, seen, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, keys) * scale
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
