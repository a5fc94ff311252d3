"""A decoder for many prefills of one prompt, which runs no layer twice.

Policies and budgets differ in what they drop, and until then compute the same; some
then drop the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asl_vllm.prefill import Known, LayerTap, ModelShape, Verdict
from asl_vllm_testing.oracle.model import LayerOutput, TinyDecoder
from benchmarks.accuracy.continuation import Cache, finish

_Path = bytes
"""Digest of the token ids that were embedded, then of the positions that came through
each layer."""


@dataclass(frozen=True, eq=False)
class Extension:
    """What the model makes of tokens after a cache's.

    hidden: ``[n, hidden]``, of the last layer.
    layers: of each, keys and values ``[n, Hkv, D]``.
    """

    hidden: Tensor
    layers: Sequence[tuple[Tensor, Tensor]]


class FusedDecoder(TinyDecoder):
    """The oracle's decoder with PyTorch's attention, which is some times faster."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the last M of T tokens: see `TinyDecoder`."""
        group = q.shape[1] // k.shape[1]
        rows, total = len(q), len(k)
        seen = None
        if rows < total:
            every = torch.ones(rows, total, dtype=torch.bool, device=q.device)
            seen = every.tril(total - rows)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.repeat_interleave(group, 1).transpose(0, 1)[None],
            v.repeat_interleave(group, 1).transpose(0, 1)[None],
            attn_mask=seen,
            is_causal=seen is None,
        )
        return mixed[0].transpose(0, 1)


class _BatchDecoder(FusedDecoder):
    """As many equal parts of tokens as there are ``pasts``, each after its own."""

    pasts: Sequence[tuple[Tensor, Tensor]] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each part sees its past and, causally, itself."""
        count = len(self.pasts)
        parts = zip(
            *(self.pasts, q.chunk(count), k.chunk(count), v.chunk(count)), strict=True
        )
        attend = super().attend
        return torch.cat(
            [
                attend(own_q, torch.cat([past[0], own_k]), torch.cat([past[1], own_v]))
                for past, own_q, own_k, own_v in parts
            ]
        )


class SharedLayers:
    """Implements `asl_vllm.prefill.DecoderModel` for one prompt after another.

    Owns what layers computed of the prompt so far, and ``cache``, what the prefill
    since the last `begin_prefill` has kept. A prefill must pass whole layers, not
    chunks of them.
    """

    def __init__(self, model: TinyDecoder) -> None:
        config = model.config
        self.model = model
        self.shape = ModelShape(
            num_layers=config.num_layers,
            hidden_size=model.embedding.shape[1],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            value_dim=config.head_dim,
            dtype=model.dtype,
            device=model.embedding.device,
        )
        self.cache: Cache = []
        self._device = model.embedding.device
        self._ids = torch.empty(0, dtype=torch.int64, device=self._device)
        # By what tokens came through which layers up to this one.
        self._outputs: dict[_Path, LayerOutput] = {}
        self._path: _Path = b""

    def begin_prompt(self, token_ids: list[int]) -> None:
        """Forgets the prompt before."""
        self._ids = torch.tensor(token_ids, device=self._device)
        self._outputs = {}

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return len(self._ids)

    def begin_prefill(self) -> None:
        """Forgets what the prefill before has kept."""
        nothing = torch.empty(0, device=self._device)
        self.cache = [(nothing, nothing)] * self.shape.num_layers

    def unpruned_cache(self) -> Cache:
        """The cache of the whole prompt but its last token."""
        return [(out.k[:-1], out.v[:-1]) for out in self.unpruned_layers()]

    def unpruned_layers(self) -> Iterator[LayerOutput]:
        """What each layer computes of the whole prompt."""
        positions = torch.arange(len(self._ids), device=self._device)
        hidden = self.embed(self._ids, positions)
        for layer in range(self.shape.num_layers):
            out = self._output(layer, hidden, positions)
            hidden = out.hidden
            yield out

    def _output(self, layer: int, hidden: Tensor, positions: Tensor) -> LayerOutput:
        self._path = _digest(self._path, positions)
        if self._path not in self._outputs:
            self._outputs[self._path] = self.model.layer(layer, hidden, positions)
        return self._outputs[self._path]

    def answers(
        self,
        caches: Sequence[Cache],
        max_tokens: int,
        eos: int | None,
        guess: Sequence[int],
        ends: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy tokens after the prompt, up to `eos`, which is left out.

        ``caches``: each of all of the prompt but its last token, or of what was kept
        of that. ``guess``: what the tokens may be. Right ones are found so in one
        step together, for all caches; it changes nothing else. ``ends``: see
        `forced_hidden`.
        """
        guess = guess[: max_tokens - 1]
        inputs = [int(self._ids[-1]), *guess]
        ends = self._ends(caches, ends)
        answers: list[list[int]] = [[] for _ in caches]
        grown: list[Cache] = []
        for cache, own, answer in zip(
            caches, self.forced_hidden(caches, guess, ends), answers, strict=True
        ):
            found = self.model.logits(own.hidden).argmax(-1).tolist()
            # Each is greedy as long as those that it was computed from are.
            right = 1
            while right < len(found) and inputs[right] == found[right - 1]:
                right += 1
            answer += found[:right]
            grown.append(
                [
                    (torch.cat([past[0], k[:right]]), torch.cat([past[1], v[:right]]))
                    for past, (k, v) in zip(cache, own.layers, strict=True)
                ]
            )
        finish(self.model, grown, answers, ends, max_tokens, eos)
        return [
            answer[: answer.index(eos)] if eos in answer else answer[:max_tokens]
            for answer in answers
        ]

    def forced_hidden(
        self,
        caches: Sequence[Cache],
        answer: Sequence[int],
        ends: Sequence[int] | None = None,
    ) -> list[Extension]:
        """What each cache makes of the prompt's last token and these after it.

        Row i of ``hidden`` is that from which token i of an answer follows. ``ends``:
        the position of that last token for each cache, where it is of another prompt
        with the same last token; None: all are of this one.
        """
        ids = [int(self._ids[-1]), *answer]
        first = self._ends(caches, ends)
        return self._extended(caches, [ids] * len(caches), first)

    def _ends(
        self, caches: Sequence[Cache], ends: Sequence[int] | None
    ) -> Sequence[int]:
        return [len(self._ids) - 1] * len(caches) if ends is None else ends

    def _extended(
        self,
        caches: Sequence[Cache],
        ids: Sequence[Sequence[int]],
        first: Sequence[int],
    ) -> list[Extension]:
        """Each cache's tokens, as many for all, from a position of its own on."""
        count, size = len(caches), len(ids[0])
        starts = torch.tensor(first, device=self._device)[:, None]
        positions = (starts + torch.arange(size, device=self._device)).flatten()
        hidden = self.model.embed(torch.tensor(ids, device=self._device).flatten())
        batch = _BatchDecoder(self.model.config, self.model.weights)
        layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in caches]
        for layer in range(self.shape.num_layers):
            batch.pasts = [cache[layer] for cache in caches]
            out = batch.layer(layer, hidden, positions)
            hidden = out.hidden
            parts = zip(out.k.chunk(count), out.v.chunk(count), strict=True)
            for own, part in zip(layers, parts, strict=True):
                own.append(part)
        return [
            Extension(part, own)
            for part, own in zip(hidden.chunk(count), layers, strict=True)
        ]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """See `DecoderModel.embed`; a path through the layers begins."""
        self._path = _digest(b"", token_ids)
        return self.model.embed(token_ids)

    def run_layer(
        self,
        layer: int,
        positions: Tensor,
        hidden: Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> None:
        """See `DecoderModel.run_layer`; one sequence at a time."""
        assert not lengths
        assert start == 0
        out = self._output(layer, hidden, positions)
        tap.on_query(out.q)
        tap.on_kv(out.k, out.v)
        hidden.copy_(out.hidden)

    def run_at(
        self,
        layer: int,
        positions: Tensor,
        hidden: Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> None:
        """Not asked for: no prompt here reuses a prefix."""
        raise NotImplementedError

    def load_prefixes(
        self,
        layer: int,
        block_ids: Tensor,
        into: Sequence[Known],
        lengths: Sequence[int] = (),
    ) -> None:
        """Likewise."""
        raise NotImplementedError

    def write_kept(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        """See `DecoderModel.write_kept`; slots must be in order."""
        self.cache[layer] = (keys.clone(), values.clone())

    def attention_scale(self, layer: int) -> float:
        """See `DecoderModel.attention_scale`."""
        scale: float = self.shape.head_dim**-0.5
        return scale

    def sum_over_ranks(self, layer_score: Tensor) -> Tensor:
        """There is one rank."""
        return layer_score

    @property
    def num_ranks(self) -> int:
        """There is one rank."""
        return 1

    def exchange(self, failed: bool, digest: bytes) -> Verdict:
        """There is one rank."""
        return Verdict.FAILED if failed else Verdict.SAME


def _digest(before: bytes, numbers: Tensor) -> bytes:
    return hashlib.blake2b(before + numbers.cpu().numpy().tobytes()).digest()
