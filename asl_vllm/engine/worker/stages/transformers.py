"""One layer at a time of a model that vLLM runs with Transformers' code.

Touch points: vLLM's Transformers backend: its ``model``, its ``forward``, and the list
of decoder layers in it. For as long as a pass runs, another list stands in its place:
layers before the wanted one hand on what they get, and it ends the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asl_vllm.engine.worker.stages.find import list_of_layers


class _Reached(Exception):
    """Ends a forward once the wanted layer has run."""


class _PassesThrough(nn.Module):
    """Stands for a layer that does not run.

    The model's forward may ask a layer for plain attributes, such as its kind.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if name[0] != "_" and isinstance(value, str | int | float | bool):
                self.__dict__.setdefault(name, value)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class _Stops(_PassesThrough):
    """Ends the forward with what comes in, or with a layer's output for ``state``."""

    def __init__(self, layer: nn.Module, *, runs: bool) -> None:
        super().__init__(layer)
        # In a tuple: the layer is not this module's child.
        self._layer = (layer,) if runs else ()
        self.state: torch.Tensor | None = None

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in self._layer:
            # Not what comes in: a model may scale its embeddings on the way.
            assert self.state is not None
            hidden_states = layer(self.state[None], *args, **kwargs)
        if isinstance(hidden_states, tuple):
            hidden_states = hidden_states[0]
        self.state = hidden_states[0]
        raise _Reached


class TransformersStages:
    """Calls the model's own forward with a list of layers that ends after one."""

    name = "Transformers layers"

    def __init__(self, model: Any) -> None:
        self._owner, self._name, self._own = list_of_layers(model)
        self._model = model
        layers = list(self._own)
        through = [_PassesThrough(layer) for layer in layers]
        stops = [_Stops(layer, runs=True) for layer in layers]
        self._embeds = nn.ModuleList([_Stops(layers[0], runs=False), *through[1:]])
        self._lists = [
            nn.ModuleList([*through[:i], stop, *through[i + 1 :]])
            for i, stop in enumerate(stops)
        ]

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Stages.embed`."""
        return self._run(self._embeds, 0, positions, token_ids, None)

    def run(self, layer: int, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """See `Stages.run`."""
        hidden.copy_(self._run(self._lists[layer], layer, positions, None, hidden))

    def _run(
        self,
        layers: nn.ModuleList,
        last: int,
        positions: torch.Tensor,
        token_ids: torch.Tensor | None,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        stop: Any = layers[last]
        stop.state = hidden
        try:
            self._owner._modules[self._name] = layers
            self._model(
                input_ids=token_ids,
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=hidden,
            )
        except _Reached:
            reached: torch.Tensor = stop.state
        else:
            raise AssertionError("the model's forward did not call its layers")
        finally:
            self._owner._modules[self._name] = self._own
            stop.state = None
        return reached
