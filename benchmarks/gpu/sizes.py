"""Model shapes and sizes of the experiments on a GPU, and of their dry run."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.gpu.stage import Host
from benchmarks.scale import Scale, Shape

MODELS: dict[str, Shape] = {
    # As Llama 3.2 1B and Llama 3.1 8B.
    "1b": {
        "arch": "llama",
        "layers": 16,
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
        "intermediate": 8192,
        "vocab": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "arch": "llama",
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "intermediate": 14336,
        "vocab": 128256,
    },
}
TINY: Shape = {
    "arch": "llama",
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 128,
}
STEP_TOKENS = 8192
DEPTHS = (1 / 3, 1 / 2, 3 / 4)
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Eager but for decoding, in one graph: starts much sooner than a compiled engine."""
GIB = 1 << 30


def shape(size: str, host: Host) -> Shape:
    """A model's shape; in a dry run a tiny one."""
    return TINY if host.dry else MODELS[size]


def parameters(of: Shape) -> int:
    """Weights of a model, about."""
    attention = of["hidden"] * of["head_dim"] * 2 * (of["heads"] + of["kv_heads"])
    layer = attention + 3 * of["hidden"] * of["intermediate"]
    tables = 1 if of.get("tie_word_embeddings") else 2
    return of["layers"] * layer + tables * of["vocab"] * of["hidden"]


def most_pool_tokens(of: Shape, memory: int, engines: int = 1) -> int:
    """Tokens of KV cache, in bf16, that each of some engines on a GPU has room for."""
    per_token = 2 * of["kv_heads"] * of["head_dim"] * of["layers"] * 2
    # Of the rest the runtime, activations and a prefill's buffers take their part.
    room = int(0.94 * memory) // engines - 2 * parameters(of) - 5 * GIB
    return room // per_token // 1024 * 1024


def gpu_memory() -> int:
    """Bytes of the GPU."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def scale(size: str, host: Host) -> Scale:
    """Sizes of the experiments."""
    own = shape(size, host)
    shapes = {"layer_bound": own, "long": own, "attention_bound": own}
    if host.dry:
        return Scale(
            rounds=1,
            prefill_tokens=(256, 384),
            growth_tokens=(256,),
            decode_contexts=(256,),
            decode_batches=(1, 2),
            decode_steps=8,
            capacity_tokens=256,
            capacity_requests=4,
            neighbour_tokens=512,
            overlong_tokens=1024,
            budget=96,
            depths=DEPTHS,
            short_requests=2,
            prefix_tokens=256,
            prefix_budget=96,
            document_tokens=384,
            answer_tokens=8,
            most_pool_tokens=2048,
            **shapes,
        )
    return Scale(
        rounds=4,
        prefill_tokens=(8192, 32768),
        growth_tokens=(8192, 32768, 131072),
        decode_contexts=(8192, 32768),
        decode_batches=(1, 4),
        decode_steps=32,
        capacity_tokens=8192,
        capacity_requests=64,
        neighbour_tokens=65536,
        overlong_tokens=131072,
        budget=1024,
        prefix_tokens=32768,
        prefix_budget=1024,
        depths=DEPTHS,
        most_pool_tokens=most_pool_tokens(own, gpu_memory()),
        **shapes,
    )


def bench(size: str, host: Host, *, compiled: bool = False) -> Bench:
    """What an experiment is given; ``compiled`` leaves vLLM its own defaults."""
    if host.dry:
        return Bench(
            scale(size, host), step_tokens=128, weights=False, share=True, apart=True
        )
    options = {
        # Each with a pool of the size that it is told.
        "gpu_memory_utilization": 0.05,
        "attention_backend": "FLASH_ATTN",
    }
    if not compiled:
        options["compilation_config"] = GRAPHS
    return Bench(
        scale(size, host),
        dtype="bfloat16",
        eager=False,
        step_tokens=STEP_TOKENS,
        weights=False,
        share=True,
        apart=True,
        options=options,
    )
