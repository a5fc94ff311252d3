"""``python -m benchmarks``: stock vLLM and asl_vllm side by side in one run.

Prints a table an experiment as it ends; ``--output`` writes the JSON as well, after
each experiment, and ``--page`` the Markdown page with its plots. Experiments that were
not run stay in the JSON if they were taken on the same machine with the same vLLM.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.bench import Bench
from benchmarks.experiments import EXPERIMENTS
from benchmarks.report import markdown, text_table, title_and_text
from benchmarks.scale import FULL, QUICK

PEER = Path("benchmarks/results/kvpress.json")
"""What `benchmarks.peer` wrote; beside other results if it is a page's."""


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "names", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="bfloat16 is emulated, and slow, on CPUs without AVX-512",
    )
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--page", type=Path, help="file for the results as Markdown")
    parser.add_argument(
        "--render",
        type=Path,
        help="only write --page, from this JSON of an earlier run",
    )
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(EXPERIMENTS))
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; allowed: {', '.join(EXPERIMENTS)}"
        )
    if args.render and not args.page:
        parser.error("--render needs --page")
    return args


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.machine())


def machine(dtype: str) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "dtype": dtype,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "vllm", "asl_vllm")},
        },
    }


def begun(output: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """Results to add to: those of ``output`` if taken on ``machine``.

    The date and asl_vllm's version may differ; experiments that stay then say so.
    """
    results: dict[str, Any] = {"machine": machine, "experiments": {}, "earlier": {}}
    if output and output.exists():
        before = json.loads(output.read_text())
        was = before["machine"]
        if _without_own(was) == _without_own(machine):
            results["experiments"] = before["experiments"]
            own = {"date": was["date"], "asl_vllm": was["versions"].get("asl_vllm")}
            results["earlier"] = {name: own for name in before["experiments"]}
            results["earlier"] |= before.get("earlier", {})
    return results


def _without_own(machine: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for experiments to stand side by side."""
    versions = {k: v for k, v in machine["versions"].items() if k != "asl_vllm"}
    return machine | {"date": None, "versions": versions}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the experiments, printing each."""
    scale = "quick" if args.quick else "full"
    bench = Bench(QUICK if args.quick else FULL, dtype=args.dtype)
    results = begun(args.output, machine(args.dtype) | {"scale": scale})
    for name in args.names or EXPERIMENTS:
        began = time.perf_counter()
        print(f"\n{title_and_text(name)[0]}", flush=True)
        rows = list(EXPERIMENTS[name].run(bench))
        results["experiments"][name] = rows
        results["earlier"].pop(name, None)
        print(text_table(name, rows))
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
        if args.output:
            results_file.write(args.output, results)
    return results


def main() -> None:
    """Runs or renders."""
    args = parse_args()
    results = json.loads(args.render.read_text()) if args.render else measure(args)
    if args.page:
        beside = (args.render or args.output or PEER).with_name(PEER.name)
        peer = json.loads(beside.read_text()) if beside.exists() else None
        images = args.page.parent / "images"
        args.page.write_text(markdown(results, images, "images", peer))


if __name__ == "__main__":
    main()
