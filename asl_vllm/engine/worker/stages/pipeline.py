"""One layer at a time of a model that can be a stage of a pipeline.

Touch points: ``start_layer``, ``end_layer`` and ``pp_group`` of a model's modules,
`IntermediateTensors`, and the pipeline group of ``vllm.distributed.parallel_state``.
A model that supports pipeline parallelism runs any range of its layers; here the range
is one layer, and for as long as it runs the group says that ranks precede and follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.sequence import IntermediateTensors

from asl_vllm.engine.worker.stages.base import NoResidualError
from asl_vllm.engine.worker.stages.find import list_of_layers, stage_owners


class _Place:
    """The pipeline group, at another place in the pipeline."""

    is_last_rank = False

    def __init__(self, group: Any, *, first: bool) -> None:
        self._group = group
        self.is_first_rank = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class PipelineStages:
    """Calls the model's own forward on a range of one layer.

    Args:
        model: One that vLLM can run in a pipeline, whole on this rank.
        adds_residual: What a layer hands on is the sum of hidden states and residual,
            not the hidden states alone.
    """

    def __init__(self, model: Any, *, adds_residual: bool) -> None:
        self.name = "pipeline stages, " + ("sum" if adds_residual else "hidden states")
        self._layers = list(list_of_layers(model)[2])
        self._model = model
        self._adds_residual = adds_residual
        self._owners = stage_owners(model)
        self._with_group = [m for m in model.modules() if "pp_group" in vars(m)]
        group = parallel_state.get_pp_group()
        self._first: Any = _Place(group, first=True)
        self._middle: Any = _Place(group, first=False)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Stages.embed`."""
        with self._range(self._first, 0, 0):
            out = self._model(
                input_ids=token_ids,
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        hidden: torch.Tensor = out["hidden_states"]
        return hidden

    def run(self, layer: int, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """See `Stages.run`."""
        # No residual, as in the first layer: the states that come in are it.
        state: dict[str, Any] = {"hidden_states": hidden, "residual": None}
        with self._range(self._middle, layer, layer + 1):
            out = self._model(
                input_ids=None,
                positions=positions,
                intermediate_tensors=IntermediateTensors(state),
                inputs_embeds=None,
            ).tensors
        if self._adds_residual:
            _add(out["hidden_states"], out.get("residual"), hidden)
        else:
            hidden.copy_(out["hidden_states"])

    @contextmanager
    def _range(self, place: Any, start: int, end: int) -> Iterator[None]:
        group, count = parallel_state._PP, len(self._layers)
        try:
            parallel_state._PP = place
            # Past Module.__setattr__, which is slow.
            for module in self._with_group:
                module.__dict__["pp_group"] = place
            for module in self._owners:
                module.__dict__["start_layer"] = start
                module.__dict__["end_layer"] = end
            yield
        finally:
            parallel_state._PP = group
            for module in self._with_group:
                module.__dict__["pp_group"] = group
            for module in self._owners:
                module.__dict__["start_layer"] = 0
                module.__dict__["end_layer"] = count


class DirectStages(PipelineStages):
    """Calls layers themselves, past the model's forward, which costs time."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, adds_residual=True)
        self.name = "direct calls"

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether layers take positions, hidden states and residual, in order."""
        return all(map(_takes_residual, list_of_layers(model)[2]))

    def run(self, layer: int, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """See `Stages.run`."""
        output, residual = self._layers[layer](positions, hidden, None)
        _add(output, residual, hidden)


def _takes_residual(layer: nn.Module) -> bool:
    taken = list(inspect.signature(layer.forward).parameters.values())
    names = [parameter.name for parameter in taken[:3]]
    return names == ["positions", "hidden_states", "residual"] and all(
        p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in taken[3:]
    )


def _add(output: torch.Tensor, residual: Any, hidden: torch.Tensor) -> None:
    if residual is None:
        raise NoResidualError
    torch.add(output, residual, out=hidden)
