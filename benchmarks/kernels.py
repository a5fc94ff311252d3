"""The kernels against the eager torch reference and against a plain copy.

``python -m benchmarks.kernels`` calls each operation of asl_kernels through its
wrapper, which takes Triton on a GPU and the reference elsewhere, and prints a table
and one line of JSON. On a GPU each result is first compared with the reference's.
On a CPU, where the reference itself runs, sizes are small and the speed-up is 1.00.

Bytes are those that must be moved: each input read once, each output written once.
They over the median time, over the bandwidth of a copy measured in the same run, are
the fraction; above 1 where the data fits in a cache that the copied buffer does not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import asl_kernels.block_table_view as view
import asl_kernels.gather_kept as gather
import asl_kernels.rank_variance as variance
import asl_kernels.window_scores as window

WINDOW, POOL = 32, 7
KV_HEADS, GROUP, DIM = 8, 4, 128
HIDDEN = 4096
LAYERS = 8
"""Layers whose ranks a check compares."""
BLOCK_SIZE = 16
BUDGET = 1024
"""Tokens that stay."""
QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Case:
    """An operation on inputs of one size."""

    what: str
    size: str
    run: Callable[[], Any]
    """Through the wrapper."""
    reference: Callable[[], Any]
    num_bytes: int
    tolerance: float = 0.0
    """Of the result, relative to its largest element; 0: the same bits."""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    """Requests in a batch."""
    copy_bytes: int
    dtype: torch.dtype


SIZES = {
    "cuda": Sizes((8192, 32768, 131072), (8, 256, 1024), 1 << 30, torch.bfloat16),
    "cpu": Sizes((2048, 4096), (8, 256), 1 << 26, torch.float32),
}


def size_in_bytes(*tensors: Tensor) -> int:
    """Memory of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scoring(tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Window scores of a prompt at one layer."""
    q = torch.randn(WINDOW, KV_HEADS * GROUP, DIM, device=device).to(dtype)
    k = torch.randn(tokens, KV_HEADS, DIM, device=device).to(dtype)
    scale = DIM**-0.5
    return Case(
        "window_scores",
        f"M {tokens}",
        lambda: window.window_scores(q, k, scale=scale, pool_kernel=POOL),
        lambda: window.reference.window_scores(q, k, scale, POOL),
        size_in_bytes(q, k) + 4 * KV_HEADS * (tokens - WINDOW),
        # Both add in fp32, in different orders.
        tolerance=1e-3,
    )


def ranking(tokens: int, device: torch.device) -> Case:
    """Ranks of one layer's scores; torch's sort on every device."""
    scores = torch.rand(tokens, device=device)
    return Case(
        "descending_ranks",
        f"M {tokens}",
        lambda: variance.descending_ranks(scores),
        lambda: variance.reference.descending_ranks(scores),
        size_in_bytes(scores) + 8 * tokens,
    )


def comparing(tokens: int, device: torch.device) -> Case:
    """Variance of the ranks of several layers."""
    rows = [torch.randperm(tokens, device=device) + 1 for _ in range(LAYERS)]
    ranks = torch.stack(rows)
    return Case(
        "rank_variance",
        f"n {LAYERS}, M {tokens}",
        lambda: variance.rank_variance(ranks, BUDGET - WINDOW),
        lambda: variance.reference.rank_variance(ranks, BUDGET - WINDOW),
        size_in_bytes(ranks) + 8,
        tolerance=1e-6,
    )


def gathering(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Kept keys and values of a layer, and the hidden states that go deeper."""
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, device=device).to(dtype)
    picked = [torch.randperm(tokens, device=device)[:BUDGET] for _ in range(KV_HEADS)]
    kept = torch.stack(picked).sort(dim=1).values
    out_bytes = 2 * BUDGET * KV_HEADS * DIM * k.element_size()
    yield Case(
        "gather_kept",
        f"M {tokens}, k {BUDGET}",
        lambda: gather.gather_kept(k, v, kept),
        lambda: (
            gather.reference.gather_rows(k, kept),
            gather.reference.gather_rows(v, kept),
        ),
        2 * out_bytes + size_in_bytes(kept),
    )
    hidden = torch.randn(tokens, HIDDEN, device=device).to(dtype)
    row_bytes = HIDDEN * hidden.element_size()
    yield Case(
        "gather_tokens",
        f"M {tokens}, k {BUDGET}",
        lambda: gather.gather_tokens(hidden, kept[0]),
        lambda: gather.reference.gather_tokens(hidden, kept[0]),
        2 * BUDGET * row_bytes + size_in_bytes(kept[0]),
    )


def viewing(rows: int, tokens: int, device: torch.device) -> Case:
    """A batch's block tables, of which every other row is pruned."""
    columns = tokens // BLOCK_SIZE
    table = torch.randint(1, 1 << 20, (rows, columns), dtype=torch.int32, device=device)
    table[::2, : (tokens - BUDGET) // BLOCK_SIZE] = 0
    lens = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    out_table, out_lens = torch.empty_like(table), torch.empty_like(lens)

    def run(wrapped: bool) -> tuple[Tensor, Tensor]:
        if wrapped:
            view.block_table_view(
                table, lens, BLOCK_SIZE, out_table=out_table, out_lens=out_lens
            )
        else:
            view.reference.block_table_view(
                table, lens, BLOCK_SIZE, out_table, out_lens
            )
        return out_table, out_lens

    return Case(
        "block_table_view",
        f"R {rows}, C {columns}",
        lambda: run(True),
        lambda: run(False),
        2 * size_in_bytes(table, lens),
    )


def cases(device: torch.device) -> Iterator[Case]:
    """The rows of the table; the inputs of one are gone when the next is made."""
    sizes = SIZES[device.type]
    for tokens in sizes.tokens:
        yield scoring(tokens, device, sizes.dtype)
    for tokens in sizes.tokens:
        yield ranking(tokens, device)
    for tokens in sizes.tokens:
        yield comparing(tokens, device)
    for tokens in sizes.tokens:
        yield from gathering(tokens, device, sizes.dtype)
    for rows in sizes.rows:
        yield viewing(rows, max(sizes.tokens), device)


def quantiles(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds at the 20th, 50th and 80th percentile of many calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        # Empties the L2 cache before each call.
        found = do_bench(run, warmup=25, rep=200, quantiles=list(QUANTILES))
        return [milliseconds / 1e3 for milliseconds in found]
    run()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 10 or time.perf_counter() < began + 0.5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return [tenths[round(10 * quantile) - 1] for quantile in QUANTILES]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for the caches."""
    source = torch.ones(SIZES[device.type].copy_bytes, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return 2 * source.numel() / quantiles(lambda: out.copy_(source), device)[1]


def check(case: Case) -> None:
    """Raises an AssertionError where the kernel's result is not the reference's."""
    for got, want in zip(results(case.run), results(case.reference), strict=True):
        if case.tolerance == 0.0:
            assert torch.equal(got, want), f"{case.what}, {case.size}"
        else:
            error = (got.double() - want.double()).abs().max() / want.abs().max()
            assert error.item() <= case.tolerance, f"{case.what}: off by {error}"


def results(run: Callable[[], Any]) -> list[Tensor]:
    """The result as tensors that the next call does not overwrite."""
    result = run()
    found = result if isinstance(result, tuple) else (result,)
    return [tensor.clone() for tensor in found]


def measure(case: Case, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    if device.type == "cuda":
        check(case)
    p20, p50, p80 = quantiles(case.run, device)
    speed_up = 1.0
    if device.type == "cuda":
        speed_up = quantiles(case.reference, device)[1] / p50
    return {
        "op": case.what,
        "size": case.size,
        "p20_us": p20 * 1e6,
        "p50_us": p50 * 1e6,
        "p80_us": p80 * 1e6,
        "bytes": case.num_bytes,
        "of_copy_bandwidth": case.num_bytes / p50 / bandwidth,
        "speed_up": speed_up,
    }


def machine(device: torch.device, bandwidth: float) -> dict[str, Any]:
    """What the figures were taken on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        with open("/proc/cpuinfo") as info:
            models = [line.split(":")[1] for line in info if "model name" in line]
        name = models[0].strip() if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cores": os.cpu_count(),
        "copy_bandwidth": bandwidth,
        "dtype": str(SIZES[device.type].dtype),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: installed(package) for package in ("torch", "triton", "asl_vllm")},
    }


def installed(package: str) -> str | None:
    """Version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parse_args() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the JSON as well")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    device = device or torch.device("cpu")
    bandwidth = copy_bandwidth(device)
    about = machine(device, bandwidth)
    print(
        f"{about['device']}; copy {bandwidth / 1e9:.1f} GB/s; {about['dtype']}; "
        f"torch {about['torch']}, triton {about['triton']}"
    )
    print(
        f"{'op':<17} {'size':<18} {'p20 us':>10} {'p50 us':>10} {'p80 us':>10} "
        f"{'MB':>9} {'of copy':>7} {'speed-up':>8}"
    )
    rows: list[dict[str, Any]] = []
    for case in cases(device):
        row = measure(case, device, bandwidth)
        rows.append(row)
        print(
            f"{row['op']:<17} {row['size']:<18} {row['p20_us']:>10.1f} "
            f"{row['p50_us']:>10.1f} {row['p80_us']:>10.1f} "
            f"{row['bytes'] / 1e6:>9.3f} {row['of_copy_bandwidth']:>7.3f} "
            f"{row['speed_up']:>8.2f}",
            flush=True,
        )
    text = json.dumps({"machine": about, "rows": rows})
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
