"""Prefill with and without selection, and requests without a budget, against stock.

``python -m benchmarks.prefill`` makes a random-weight model in which the layers
dominate, starts stock vLLM and two asl_vllm engines (snapkv; asl with a fixed
selection layer), times them in turn and prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.engines import EngineProcess, median_ratio
from benchmarks.random_model import write_random_model

LAYERS = 8
SHAPE = {
    "layers": LAYERS,
    "hidden": 512,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 1536,
}
SELECTION_LAYER = 3
BUDGET = 1024
STOCK = "stock"
POLICIES: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "snapkv": {"policy": "snapkv"},
    "asl": {"policy": "asl", "selection_layer": SELECTION_LAYER},
}
"""Engine name -> asl_vllm options; all other settings are the same."""


@dataclass(frozen=True)
class Case:
    """What each engine named is asked to do, in turn."""

    what: str
    engines: tuple[str, ...]
    num_tokens: int
    rounds: int
    budget: int | None = None
    batch: int = 1
    max_tokens: int = 1


def cases(num_tokens: int, rounds: int) -> Iterator[Case]:
    """The rows of the table."""
    yield Case(
        f"prefill of {num_tokens}, kv_budget {BUDGET}",
        ("snapkv", "asl"),
        num_tokens,
        rounds,
        budget=BUDGET,
    )
    # Small differences need many rounds.
    quick = 8 * rounds
    yield Case("no budget: prefill of 1024", ("asl",), 1024, quick)
    yield Case(
        "no budget: 4 prompts of 128, 32 tokens each",
        ("asl",),
        128,
        quick,
        batch=4,
        max_tokens=32,
    )


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtype",
        default="float32",
        help="bfloat16 is emulated, and slow, on CPUs without AVX-512",
    )
    parser.add_argument("--output", type=Path, help="file for the JSON as well")
    return parser.parse_args()


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids that look random and differ from seed to seed."""
    return [(i * 7919 + seed * 104729 + 13) % 500 + 4 for i in range(num_tokens)]


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


def measure(case: Case, engines: dict[str, EngineProcess]) -> list[dict[str, Any]]:
    """Times the case round by round; a warm-up round is not counted."""
    names = (STOCK, *case.engines)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(case.rounds + 1):
        prompts = [prompt(case.num_tokens, 17 * number + i) for i in range(case.batch)]
        # Whoever goes first in one round goes last in the next.
        for name in names if number % 2 else reversed(names):
            budget = case.budget if name != STOCK else None
            seconds, report = engines[name].time(
                prompts, max_tokens=case.max_tokens, budget=budget
            )
            assert (report is not None) == (budget is not None)
            if number:
                times[name].append(seconds)
    return [
        {
            "what": case.what,
            "engine": name,
            "stock_s": statistics.median(times[STOCK]),
            "ours_s": statistics.median(times[name]),
            "ratio": median_ratio(times[name], times[STOCK]),
            "rounds": case.rounds,
        }
        for name in case.engines
    ]


def work_share(num_tokens: int) -> float:
    """Token-layers that selection after SELECTION_LAYER leaves, of all."""
    deep = LAYERS - SELECTION_LAYER - 1
    full = num_tokens * LAYERS
    return (num_tokens * (SELECTION_LAYER + 1) + BUDGET * deep) / full


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as info:
        cpu = next((x.split(":")[1].strip() for x in info if "model name" in x), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **{name: version(name) for name in ("torch", "vllm", "asl_vllm")},
        "dtype": args.dtype,
        "model": SHAPE,
    }


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_random_model(folder, **SHAPE)
        engines = {}
        for name, policy in POLICIES.items():
            print(f"starting {name} ...", flush=True)
            options = engine_options(args)
            if policy is not None:
                options["additional_config"] = {"asl_vllm": policy}
            engines[name] = stack.enter_context(EngineProcess(name, folder, options))
        print(
            f"selection after layer {SELECTION_LAYER} of {LAYERS} leaves "
            f"{work_share(args.num_tokens):.3f} of the token-layers"
        )
        print(f"{'':<44} {'engine':<7} {'stock s':>8} {'ours s':>8} {'ratio':>6}")
        for case in cases(args.num_tokens, args.rounds):
            for row in measure(case, engines):
                rows.append(row)
                print(
                    f"{row['what']:<44} {row['engine']:<7} {row['stock_s']:>8.3f} "
                    f"{row['ours_s']:>8.3f} {row['ratio']:>6.3f}",
                    flush=True,
                )
    text = json.dumps({"machine": machine(args), "rows": rows})
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
