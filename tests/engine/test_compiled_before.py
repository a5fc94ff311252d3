"""Requests need no variant of a Triton kernel that the start has not compiled.

Triton itself says what it would compile: a launch's key, from what it is given. Nothing
is compiled or launched; the toy's numbers come from the references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import (
    JITFunction,
    compute_cache_key,
    create_function_from_signature,
)
from vllm.utils.math_utils import cdiv

from asl_kernels.window_scores.triton import launch
from asl_vllm.engine.worker.attend_at import attend_at
from asl_vllm.engine.worker.warm_up import warm_up
from asl_vllm.prefill import (
    Known,
    LayerTap,
    Packer,
    PrefillBuffers,
    PrefillFactory,
    PrefillJob,
    PrefillQueue,
    hidden,
    prompt,
    tap,
)
from asl_vllm.selection import settling, together
from asl_vllm.selection.policies import POLICIES, base
from asl_vllm_testing import toy
from asl_vllm_testing.toy import ToyDecoder

SHAPE = dataclasses.replace(
    toy.SHAPE, hidden_size=64, head_dim=16, value_dim=16, dtype=torch.float32
)
CHUNK, CAPACITY, BLOCK = 160, 400, 16
WRAPPERS: tuple[tuple[ModuleType, str], ...] = (
    (base, "window_scores"),
    (together, "window_scores"),
    (prompt, "gather_kept"),
    (hidden, "gather_tokens"),
    (tap, "gather_tokens"),
    (settling, "rank_variance"),
)
KERNELS = {
    "statistics_kernel",
    "combine_kernel",
    "mass_kernel",
    "average_kernel",
    "gather_kernel",
    "gather_pair_kernel",
    "partial_kernel",
    "final_kernel",
    "attention_at_kernel",
}


class Decoder(ToyDecoder):
    """Runs selected tokens of a cached prefix as vLLM's layers do."""

    def run_layer(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> None:
        random = torch.Generator().manual_seed(100 * layer + start)
        q, k, v = (
            torch.rand(len(hidden), heads, SHAPE.head_dim, generator=random)
            for heads in (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
        )
        tap.on_query(q)
        tap.on_kv(k, v)

    def run_at(
        self,
        layer: int,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> None:
        query = hidden.new_zeros(len(hidden), SHAPE.num_heads, SHAPE.head_dim)
        with on_a_gpu():
            attend_at(query, positions, known, lengths, 1.0, torch.zeros_like(query))

    def write_kept(self, *_: Any) -> None:
        """Nobody reads it."""

    def load_prefixes(
        self, layer: int, _: Any, into: Sequence[Known], lengths: Sequence[int] = ()
    ) -> None:
        random = torch.Generator().manual_seed(layer)
        for own in into:
            own.keys.copy_(torch.rand(own.keys.shape, generator=random))
            own.values.copy_(torch.rand(own.values.shape, generator=random))


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """Tensors say that they are there, so that wrappers choose Triton."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True, raising=False)
        patched.setattr(torch.cuda, "device", lambda _: nullcontext())
        patched.setattr(launch, "programs_of", lambda _: 528)
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Names and keys of the variants that launches would find or have compiled."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys: set[tuple[str, str]] = set()

    @cache
    def binder(kernel: Any) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, backend)

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        _, specialization, rest = binder(self)(*args, **options)
        keys.add((self.__name__, compute_cache_key({}, specialization, rest)))

    monkeypatch.setattr(JITFunction, "run", note)

    def noted(call: Any) -> Any:
        def both(*args: Any, **options: Any) -> Any:
            with on_a_gpu():
                call(*args, **options)
            return call(*args, **options)

        return both

    for module, name in WRAPPERS:
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    return keys


def factory() -> PrefillFactory:
    held = PrefillBuffers(SHAPE, CAPACITY, toy.WINDOW, packed=4)
    # Every layer from l_min on is looked at, and fixed ones are selected at.
    return PrefillFactory(Decoder(SHAPE), held, toy.config(), CHUNK)


def request(
    name: str, policy: str, tokens: int, kept: int, cached: int = 0
) -> PrefillJob:
    made = toy.job(name, n=tokens, pruned=tokens - kept, policy=policy)
    if not cached:
        return made
    # Whole blocks are pruned; where the rest lies matters to nobody here.
    pruned = (tokens - kept) // BLOCK
    left = cdiv(tokens, BLOCK) - pruned
    return dataclasses.replace(
        made,
        block_size=BLOCK,
        pruned_blocks=pruned,
        block_ids=[[1] * left],
        reused_block_ids=[[1] * (cached // BLOCK)],
    )


def requests() -> Iterator[PrefillJob]:
    """Of every policy: chunks full, cut and of a token; lengths of 16 and others."""
    for policy in POLICIES:
        for tokens in (CHUNK, CHUNK + 1, 97, 96 + toy.WINDOW):
            for kept in (32, 49):
                yield request(f"{policy}-{tokens}-{kept}", policy, tokens, kept)
        for tokens, cached in ((97, 48), (333, 320), (112 + toy.WINDOW, 112)):
            name = f"{policy}-{tokens}-cached"
            yield request(name, policy, tokens, 30, cached)


def test_requests_compile_nothing(compiled: set[tuple[str, str]]) -> None:
    made = factory()
    packer = Packer(made)
    warm_up(made, POLICIES, 1, packer, cached_block=BLOCK)
    before = set(compiled)
    assert {name for name, _ in before} == KERNELS
    for job in requests():
        prefill = made(job)
        while not prefill.done:
            prefill.advance(10**9)
    queue = PrefillQueue(made, packer)
    for count in (2, 3, 4):
        for number in range(count):
            queue.add(request(f"{count}-{number}", "asl", 17 + number, 16))
        for number in range(count):
            name, tokens = f"{count}-{number}-cached", 50 + number
            queue.add(request(name, "fastkv", tokens, 21 + number, cached=32))
        while len(queue):
            queue.step(10**9)
    assert compiled - before == set()
