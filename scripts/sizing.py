"""Works out what a KV budget saves and what a server needs, by asl_vllm's arithmetic.

    .venv/bin/python scripts/sizing.py --pool-gib 40 --prompt 32768 --budget 2048

The model is one of Llama-3.1-8B's shape unless ``--config`` names a model's
config.json. Docs: docs/runbook.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from asl_vllm.config import AslConfig
from asl_vllm.prefill import MOST_PACKED, ModelShape
from asl_vllm.selection.budget import minimum_budget, resolve_kept

LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizing:
    """Bytes and tokens of one engine; bytes are of one tensor-parallel rank."""

    shape: ModelShape
    """The rank's part of the model."""
    block_size: int
    window: int
    prefill_tokens: int
    """``max_prefill_tokens``: the longest prompt that can be pruned."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the KV pool: keys and values of a token in all layers."""
        return self.shape.num_layers * self._layer_bytes

    @property
    def prefill_bytes(self) -> int:
        """Reserved outside the pool: `PrefillBuffers` and `ScratchPages`."""
        shape = self.shape
        queries = MOST_PACKED * self.window * shape.num_heads * shape.head_dim
        pages = -(-self.prefill_tokens // self.block_size) * self.block_size
        rows = self.prefill_tokens * shape.bytes_per_token()
        return rows + queries * shape.dtype.itemsize + pages * self._layer_bytes

    @property
    def minimum_budget(self) -> int:
        """Tokens; smaller budgets are refused."""
        return minimum_budget(self.window, self.block_size)

    @property
    def _layer_bytes(self) -> int:
        shape = self.shape
        width = shape.head_dim + shape.value_dim
        return shape.num_kv_heads * width * shape.dtype.itemsize

    def pool_tokens(self, pool_bytes: int) -> int:
        """Tokens that a pool of so many bytes holds, in whole blocks.

        One block is vLLM's null block and holds none.
        """
        blocks = pool_bytes // (self.block_size * self.kv_bytes_per_token)
        return max(0, blocks - 1) * self.block_size

    def held_tokens(self, prompt: int, kept: int, new_tokens: int) -> int:
        """Tokens of pool that a request holds at its end, in whole blocks."""
        blocks = -(-(prompt + new_tokens) // self.block_size)
        return blocks * self.block_size - (prompt - kept)


def shape_of(config: dict[str, int], tensor_parallel: int) -> ModelShape:
    """A rank's part of a model in bf16, from keys of its config.json."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads // tensor_parallel,
        num_kv_heads=max(1, kv_heads // tensor_parallel),
        head_dim=head_dim,
        value_dim=head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, help="a model's config.json")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=AslConfig().window)
    parser.add_argument("--max-prefill-tokens", type=int, help="default: the model's")
    parser.add_argument("--pool-gib", type=float, default=40, help="of one rank")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens")
    parser.add_argument("--budget", type=json.loads, default=2048, help="as kv_budget")
    parser.add_argument("--new-tokens", type=int, default=512)
    asked = parser.parse_args(arguments)

    config = json.loads(asked.config.read_text()) if asked.config else LLAMA_8B
    sizing = Sizing(
        shape=shape_of(config, asked.tensor_parallel),
        block_size=asked.block_size,
        window=asked.window,
        prefill_tokens=asked.max_prefill_tokens or config["max_position_embeddings"],
    )
    kept = resolve_kept(
        asked.budget,
        num_prompt_tokens=asked.prompt,
        block_size=asked.block_size,
        window=asked.window,
    )
    pool = sizing.pool_tokens(int(asked.pool_gib * 2**30))
    whole = sizing.held_tokens(asked.prompt, asked.prompt, asked.new_tokens)
    held = sizing.held_tokens(asked.prompt, kept, asked.new_tokens)
    per_token = sizing.prefill_bytes // sizing.prefill_tokens
    rows = [
        ("KV pool, a token", f"{sizing.kv_bytes_per_token:,} bytes"),
        (f"KV pool of {asked.pool_gib:g} GiB", f"{pool:,} tokens"),
        ("pruned prefill, a token", f"{per_token:,} bytes"),
        (
            f"pruned prefill of {sizing.prefill_tokens:,}",
            f"{gib(sizing.prefill_bytes)}, outside the pool",
        ),
        ("smallest budget", f"{sizing.minimum_budget} tokens"),
        (f"kept of {asked.prompt:,} at budget {asked.budget}", f"{kept:,} tokens"),
        (f"held with {asked.new_tokens} new tokens, pruned", f"{held:,} tokens"),
        (f"held with {asked.new_tokens} new tokens, whole", f"{whole:,} tokens"),
        ("requests that fit, pruned", f"{pool // held:,}"),
        ("requests that fit, whole", f"{pool // whole:,}"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
