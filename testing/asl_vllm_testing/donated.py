"""Prefixes that the toy decoder's pool holds, left by other prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from asl_vllm.prefill import LayerTap, ModelShape, PrefillJob
from asl_vllm_testing.toy import CAPACITY, SHAPE, VOCABULARY, ToyDecoder, buffers

Pool = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of each layer; a block is a row."""


def donated(prefix: Sequence[int], seed: int, shape: ModelShape = SHAPE) -> Pool:
    """The pool after a prompt that begins with ``prefix`` and goes on otherwise.

    Rows are in reverse, so that no block lies where its row does.
    """
    random = torch.Generator().manual_seed(seed)
    other = torch.randint(VOCABULARY, (7,), generator=random)
    donor, rows = ToyDecoder(shape=shape), len(prefix)
    tokens = torch.cat([torch.tensor(prefix, dtype=torch.int64), other])[:CAPACITY]
    positions = torch.arange(len(tokens))
    hidden = donor.embed(tokens, positions)
    tap = LayerTap(buffers())
    for layer in range(shape.num_layers):
        tap.start_layer(len(tokens))
        tap.start_chunk(0, len(tokens))
        donor.run_layer(layer, positions, hidden, 0, tap)
    return {
        layer: (donor.keys[layer][:rows].flip(0), donor.values[layer][:rows].flip(0))
        for layer in donor.keys
    }


def over_prefixes(
    works: Sequence[PrefillJob], hits: Sequence[int], shape: ModelShape = SHAPE
) -> tuple[list[PrefillJob], Pool]:
    """The jobs over so many cached tokens of each, and the pool that holds these."""
    made, pools, first = [], [], 0
    for seed, (work, hit) in enumerate(zip(works, hits, strict=True)):
        pools.append(donated(list(work.prompt_token_ids)[:hit], seed, shape))
        blocks = [list(range(first, first + hit))[::-1]] * work.bands if hit else []
        made.append(dataclasses.replace(work, reused_block_ids=blocks))
        first += hit
    pool = {
        layer: (
            torch.cat([own[layer][0] for own in pools]),
            torch.cat([own[layer][1] for own in pools]),
        )
        for layer in range(shape.num_layers)
    }
    return made, pool
