"""What runs in passes, a bounded amount at a time."""

from __future__ import annotations

import abc


class Advancing(abc.ABC):
    """A prefill, or several that pass together."""

    def __init__(self) -> None:
        self.computed_token_layers = 0

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether no pass is left."""

    @property
    @abc.abstractmethod
    def next_cost(self) -> int:
        """Token-layers of the pass that runs next."""

    @abc.abstractmethod
    def _run_pass(self) -> None:
        """Runs it, and adds its cost to ``computed_token_layers`` first."""

    def advance(self, token_layers: int) -> int:
        """Runs whole passes while they fit ``token_layers``; returns the cost.

        The first runs whether it fits or not. None is cut short, so that chunk
        borders, and with them the arithmetic, never depend on load.
        """
        before = self.computed_token_layers
        limit = before + token_layers
        while not self.done and (
            self.computed_token_layers == before
            or self.computed_token_layers + self.next_cost <= limit
        ):
            self._run_pass()
        return self.computed_token_layers - before
