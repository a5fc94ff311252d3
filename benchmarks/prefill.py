"""Prefill with and without selection, and requests without a budget, against stock.

``python -m benchmarks.prefill`` makes a random-weight model in which the layers
dominate, starts stock vLLM and two asl_vllm engines (snapkv; asl with a fixed
selection layer), times them in turn and prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from benchmarks.engines import EngineProcess, median_ratio
from benchmarks.random_model import write_random_model

LAYERS = 8
SELECTION_LAYER = 3
BUDGET = 1024


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids that look random and never repeat between seeds."""
    return [(i * 7919 + seed * 104729 + 13) % 500 + 3 for i in range(num_tokens)]


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same process settings for all engines."""
    return {
        "dtype": args.dtype,
        "max_model_len": 2 * args.num_tokens,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29,
    }


def policies() -> dict[str, dict[str, Any] | None]:
    """Engine name -> asl_vllm options, None for stock."""
    return {
        "stock": None,
        "snapkv": {"policy": "snapkv"},
        "asl": {"policy": "asl", "selection_layer": SELECTION_LAYER},
    }


def measure(args: argparse.Namespace, engines: dict[str, EngineProcess]) -> list[Any]:
    """Rows of (what, median seconds of stock, median seconds of ours, ratio)."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        f"prefill {args.num_tokens}, snapkv, no selection": (
            "snapkv",
            {"budget": BUDGET, "max_tokens": 1},
        ),
        f"prefill {args.num_tokens}, selection after layer {SELECTION_LAYER}": (
            "asl",
            {"budget": BUDGET, "max_tokens": 1},
        ),
        "no budget: prefill 2048": ("asl", {"max_tokens": 1, "num_tokens": 2048}),
        "no budget: 4 x 512 prompts, 64 tokens each": (
            "asl",
            {"max_tokens": 64, "num_tokens": 512, "batch": 4},
        ),
    }
    rows = []
    for what, (name, case) in cases.items():
        stock, ours = [], []
        repeats = args.rounds if "budget" in case else 3 * args.rounds
        for round_ in range(repeats + 1):
            prompts = [
                prompt(case.get("num_tokens", args.num_tokens), round_ * 17 + i)
                for i in range(case.get("batch", 1))
            ]
            tokens = case["max_tokens"]
            pair = [
                (stock, lambda: engines["stock"].time(prompts, max_tokens=tokens)),
                (
                    ours,
                    lambda: engines[name].time(
                        prompts, max_tokens=tokens, budget=case.get("budget")
                    ),
                ),
            ]
            # Whoever goes first in one round goes second in the next.
            for times, run in pair if round_ % 2 else reversed(pair):
                seconds, report = run()
                if round_:
                    times.append(seconds)
            if times is ours and case.get("budget"):
                assert report is not None
        rows.append(
            {
                "what": what,
                "stock_s": statistics.median(stock),
                "ours_s": statistics.median(ours),
                "ratio": median_ratio(ours, stock),
                "rounds": repeats,
            }
        )
        print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['what']:<45} {row['stock_s']:>9.3f} {row['ours_s']:>9.3f} "
        f"{row['ratio']:>7.3f}",
        flush=True,
    )


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_random_model(
            folder,
            layers=LAYERS,
            hidden=512,
            heads=8,
            kv_heads=2,
            head_dim=64,
            intermediate=1536,
        )
        engines = {}
        for name, policy in policies().items():
            print(f"starting {name} ...", flush=True)
            options = engine_options(args)
            if policy is not None:
                options["additional_config"] = {"asl_vllm": policy}
            engines[name] = stack.enter_context(EngineProcess(name, folder, options))
        print(f"{'':<45} {'stock s':>9} {'ours s':>9} {'ratio':>7}")
        rows = measure(args, engines)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm"),
        "asl_vllm": version("asl_vllm"),
    }
    print(json.dumps({"machine": machine, "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
