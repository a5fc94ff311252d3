"""Experiments that share one pair of engines, which start once.

A compiled engine of an 8B model takes a minute to start and its experiments seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import Bench
from benchmarks.engines import EngineProcess, Forgetful, Measured, Variant
from benchmarks.rounds import STOCK
from benchmarks.scale import Shape


@dataclass(frozen=True)
class OnePair(Bench):
    """Gives every experiment the two engines that `started` started."""

    pair: tuple[EngineProcess, ...] = ()
    """Stock vLLM, and an engine with asl_vllm that serves all policies."""
    shape: Shape | None = None
    max_model_len: int = 0
    pool_tokens: int = 0

    @contextmanager
    def engines(
        self,
        shape: Shape,
        policies: dict[str, dict[str, Any]],
        *,
        max_model_len: int,
        pool_tokens: int,
        stock: bool = True,
        enable_prefix_caching: bool = False,
        **options: Any,
    ) -> Iterator[list[Measured]]:
        """As `Bench.engines`; the pool may be larger than what is asked for.

        Without prefix caching, what is cached is forgotten before each load.

        Raises:
            ValueError: An experiment asks for another model, more room, or options
                that engines have to be started with.
        """
        if options.keys() - {"max_num_seqs"} or shape != self.shape:
            raise ValueError(f"not what was started: {shape}, {sorted(options)}")
        if max_model_len > self.max_model_len or pool_tokens > self.pool_tokens:
            raise ValueError(
                f"got {max_model_len} tokens in a pool of {pool_tokens}; started were "
                f"{self.max_model_len} in {self.pool_tokens}."
            )
        plain, ours = self.pair
        wanted: list[EngineProcess | Variant] = [plain] if stock else []
        wanted += [Variant(name, ours, policy) for name, policy in policies.items()]
        yield [*wanted] if enable_prefix_caching else [*map(Forgetful, wanted)]


@contextmanager
def started(
    bench: Bench, shape: Shape, *, max_model_len: int, pool_tokens: int
) -> Iterator[OnePair]:
    """Starts the pair, both at once."""
    given = {name: getattr(bench, name) for name in bench.__dataclass_fields__}
    room = {"max_model_len": max_model_len, "pool_tokens": pool_tokens}
    settings = bench.settings(shape, **room, enable_prefix_caching=True)
    with bench.model(shape) as model:
        wanted: Sequence[tuple[str, dict[str, Any] | None]]
        wanted = ((STOCK, None), ("all", {"policy": "asl"}))
        pair = [EngineProcess(name, model, settings, policy) for name, policy in wanted]
        with pair[0], pair[1]:
            for process in pair:
                process.wait_until_ready()
            yield OnePair(**given, pair=tuple(pair), shape=shape, **room)
