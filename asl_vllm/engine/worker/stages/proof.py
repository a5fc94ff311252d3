"""Which way of calling single layers is right, shown on a short prompt.

Before a server answers, the model's own forward and its layers one by one must give the
same queries, keys and values in every layer; no list of architectures says so.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.worker.stages.base import NoResidualError, Stages
from asl_vllm.engine.worker.stages.find import runs_on_transformers
from asl_vllm.engine.worker.stages.pipeline import DirectStages, PipelineStages
from asl_vllm.engine.worker.stages.positions import of_text
from asl_vllm.engine.worker.stages.transformers import TransformersStages
from asl_vllm.prefill import LayerTap

logger = init_logger(__name__)

PROOF_TOKENS = 48
_NAMES = ("queries", "keys", "values")
_SHARE = 0.75
"""Of the rows that must be near. A mixture of experts may send a few tokens elsewhere
where rounding differs; what is wrong is wrong for most."""
Around = Callable[[int, int, Sequence[int]], AbstractContextManager[None]]
"""What calls of layers on rows [start, end) need: forward context, scratch pages."""


class _Record(LayerTap):
    """Notes what a layer's attention is given, chunk by chunk."""

    def __init__(self) -> None:
        self.keys_only = False
        self._seen: dict[str, list[Tensor]] = {name: [] for name in _NAMES}

    # Copies: what a chunk is computed in may be used again.

    def on_query(self, query: Tensor) -> None:
        self._seen["queries"].append(query.float().clone())

    def on_kv(self, key: Tensor, value: Tensor) -> None:
        self._seen["keys"].append(key.float().clone())
        self._seen["values"].append(value.float().clone())

    def whole(self) -> dict[str, Tensor]:
        return {name: torch.cat(chunks) for name, chunks in self._seen.items()}


@dataclass
class Found:
    """How far one way is from the model's own forward.

    ``off`` is 0 only where all is equal to the bit; else it is the greatest difference
    of a tensor's rows, as a share of their size. ``off_in_chunks`` likewise compares a
    layer in chunks with the same layer in one.
    """

    stages: Stages
    off: float = 0.0
    off_in_chunks: float = 0.0
    where: str = ""
    """The first place that is further off than allowed."""


class Proof:
    """Runs a short prompt whole and layer by layer, over scratch pages.

    Args:
        model: vLLM's model, with its weights.
        attentions: The attention module of each layer.
        around: Makes the surroundings of calls.
        greatest: The greatest of what ranks bring, the same on each.
        tokens: Most tokens of a chunk.
        dtype: Of the activations: how much rounding is allowed.
        vocabulary: Token ids below this are used.
        dimensions: Numbers that a position has.
        device: Where the model is.
    """

    def __init__(
        self,
        model: Any,
        attentions: Sequence[Any],
        around: Around,
        greatest: Callable[[float], float],
        *,
        tokens: int,
        dtype: torch.dtype,
        vocabulary: int,
        dimensions: int,
        device: torch.device,
    ) -> None:
        self._model, self._attentions = model, attentions
        self._around, self._greatest = around, greatest
        self._count = min(PROOF_TOKENS, tokens)
        places = torch.arange(self._count, device=device)
        self._positions = of_text(places, dimensions)
        self._ids = (places * 7919 + 5) % vocabulary
        # Kernels may round otherwise for another number of rows, activations may be
        # quantised by their greatest, and of many layers in 16 bits it adds up.
        self._allowed = 1e-4 if dtype == torch.float32 else 0.1

    @torch.inference_mode()
    def find(self) -> Found:
        """The first way that is exact, or else the nearest within rounding.

        Raises:
            UnsupportedError: there is none; names the layer and tensor that differ.
        """
        began = time.perf_counter()
        own = self._own_forward()
        tried: list[Found] = []
        for make in _ways(self._model):
            tried.append(self._compare(make(), own))
            if tried[-1].off == 0 and not tried[-1].where:
                break
        right = [found for found in tried if not found.where]
        if not right:
            told = (f"by {found.stages.name}, {found.where}" for found in tried)
            raise UnsupportedError(
                "a model whose layers, called one by one, do what its forward does",
                f"{type(self._model).__name__}, where they do not: " + "; ".join(told),
                "choose another model",
            )
        best = min(right, key=lambda found: found.off)
        logger.info(
            "asl_vllm: layers of %s one by one, by %s, do what its forward does; off "
            "by %.2g, in chunks by %.2g; checked in %.2f s",
            type(self._model).__name__,
            best.stages.name,
            best.off,
            best.off_in_chunks,
            time.perf_counter() - began,
        )
        return best

    def _own_forward(self) -> list[dict[str, Tensor]]:
        every = list(range(len(self._attentions)))
        with self._around(0, self._count, every), self._recording(every) as records:
            self._model(
                input_ids=self._ids,
                positions=self._positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return [record.whole() for record in records]

    def _compare(self, stages: Stages, own: list[dict[str, Tensor]]) -> Found:
        found = Found(stages)
        try:
            self._run(stages, own, found)
        except torch.OutOfMemoryError:
            raise
        except NoResidualError:
            found.where = "a layer hands on no residual"
        except Exception as error:
            # Its calls do not fit the model: no way, and the reason is told.
            found.where = repr(error)
        # Ranks go the same ways, or they would wait for each other.
        for name in ("off", "off_in_chunks"):
            setattr(found, name, self._greatest(getattr(found, name)))
        if self._greatest(bool(found.where)) and not found.where:
            found.where = "another rank's layers differ"
        return found

    def _run(self, stages: Stages, own: list[dict[str, Tensor]], found: Found) -> None:
        part = max(1, self._count * 2 // 5)
        bounds = [*range(0, self._count, part), self._count]
        chunks = list(itertools.pairwise(bounds))
        with self._around(0, self._count, ()):
            hidden = stages.embed(self._ids, self._positions).clone()
        for layer, expected in enumerate(own):
            # In chunks of what the whole run has, so that rounding does not add up.
            before = hidden.clone()
            whole = self._layer(stages, layer, hidden, [(0, self._count)])
            parts = self._layer(stages, layer, before, chunks)
            whole["output"], parts["output"] = hidden, before
            for name, tensor in parts.items():
                place = f"{name} of layer {layer} differ"
                if name in expected:
                    off = _off(whole[name], expected[name])
                    found.off = max(found.off, off)
                    self._note(found, off, place)
                off = _off(tensor, whole[name])
                found.off_in_chunks = max(found.off_in_chunks, off)
                self._note(found, off, f"{place} in chunks")

    def _note(self, found: Found, off: float, place: str) -> None:
        if off > self._allowed and not found.where:
            found.where = f"{place} by {off:.2g} of their size"

    def _layer(
        self, stages: Stages, layer: int, hidden: Tensor, chunks: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        with self._recording([layer]) as (record,):
            for start, end in chunks:
                with self._around(start, end, [layer]):
                    stages.run(
                        layer, self._positions[..., start:end], hidden[start:end]
                    )
        return record.whole()

    @contextmanager
    def _recording(self, layers: list[int]) -> Iterator[list[_Record]]:
        records = [_Record() for _ in layers]
        impls: list[Any] = [self._attentions[layer].impl for layer in layers]
        try:
            for impl, record in zip(impls, records, strict=True):
                impl.tap = record
            yield records
        finally:
            for impl in impls:
                impl.tap = None


def _ways(model: Any) -> Iterator[Callable[[], Stages]]:
    """The cheapest first."""
    if runs_on_transformers(model):
        yield lambda: TransformersStages(model)
        return
    if DirectStages.fits(model):
        yield lambda: DirectStages(model)
    yield lambda: PipelineStages(model, adds_residual=True)
    yield lambda: PipelineStages(model, adds_residual=False)


def _off(got: Tensor, expected: Tensor) -> float:
    """0 where all is equal, else by how much of its size a row of most differs."""
    if got.shape != expected.shape:
        return math.inf
    # Weights that are no model's may give numbers that are not finite, on both sides.
    got, expected = (
        torch.nan_to_num(numbers.float(), 1e6, 1e6, -1e6) for numbers in (got, expected)
    )
    if torch.equal(got, expected):
        return 0.0
    size = expected.flatten(1).norm(dim=1).clamp(min=1e-30)
    rows = (got - expected).flatten(1).norm(dim=1) / size
    return max(torch.quantile(rows, _SHARE).item(), math.ulp(0.0))
