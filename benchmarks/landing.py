"""The README's picture, from measured results: ``python -m benchmarks.landing``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import plots

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "at_a_glance.png"
MID_DEPTH = "asl after layer 15"


def main() -> None:
    """Writes the picture."""
    speed = json.loads((RESULTS / "nvidia-h100-80gb-hbm3/speed-8b.json").read_text())
    cpu = json.loads((RESULTS / "cpu-epyc-2core.json").read_text())
    pyplot = plots.pyplot()
    size: Any = {"figsize": (8.2, 2.9), "layout": "constrained"}
    figure, (left, right) = pyplot.subplots(1, 2, width_ratios=(2, 1), **size)
    _first_token(
        left,
        [
            row
            for row in speed["rows"]
            if (row["experiment"], row.get("engine")) == ("prefill", MID_DEPTH)
        ],
    )
    _at_once(right, cpu["experiments"]["capacity"])
    plots.save(figure, IMAGE)


def _first_token(axes: Any, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    for shift, engine, key in ((-0.2, "stock vLLM", "stock_s"), (0.2, "asl", "ours_s")):
        bars = axes.bar(
            [place + shift for place in places],
            [row[key] / row["stock_s"] for row in rows],
            width=0.4,
            label=engine,
        )
        labels = [f"{row[key]:.2f} s" for row in rows]
        axes.bar_label(bars, labels, fontsize=8)
    axes.set_xticks(places, [f"{row['tokens'] // 1024}k tokens" for row in rows])
    axes.set_yticks([])
    axes.set_ylim(top=1.35)
    axes.set_title("Time to first token, Llama 8B's shape, one H100", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _at_once(axes: Any, rows: list[dict[str, Any]]) -> None:
    bars = axes.bar(
        ["stock vLLM", "asl"],
        [row["peak_running"] for row in rows],
        color=["C0", "C1"],
    )
    axes.bar_label(bars)
    axes.set_title("8k prompts at once,\nKV pool for two", fontsize=10)
    axes.set_yticks([])
    axes.margins(y=0.15)


if __name__ == "__main__":
    main()
