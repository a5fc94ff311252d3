"""Summaries as tables (text and Markdown) and plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.accuracy.cells import FULL
from benchmarks.accuracy.summary import Row

Table = list[list[str]]


def score_cell(row: Row) -> str:
    """Accuracy and its interval."""
    return f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def layer_cell(row: Row) -> str:
    """Median and range of the layers chosen, and how many prompts chose none."""
    chosen = [
        int(layer)
        for layer, count in row["layers"].items()
        if layer != "none"
        for _ in range(count)
    ]
    none = row["layers"].get("none", 0)
    if not chosen:
        return "none"
    text = f"{statistics.median(chosen):g} ({min(chosen)} to {max(chosen)})"
    return f"{text}, {none / row['n']:.0%} none" if none else text


def work_cell(row: Row) -> str:
    """Token-layers computed, as a share of the unpruned prompt's."""
    return "-" if row["work"] is None else f"{row['work']:.2f}"


def kl_cell(row: Row) -> str:
    """Divergence from the unpruned model, in nats a token."""
    return "-" if row["kl"] is None else f"{row['kl']:.3f}"


def table(rows: Sequence[Row], cell: Callable[[Row], str]) -> Table:
    """Policy x budget down, tasks across; its first line are the headings."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines: dict[tuple[str, int | None], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["policy"], row["budget"]), {})
        line[row["task"]] = cell(row)
    return [
        ["policy", "budget", *tasks],
        *(
            [policy, "-" if budget is None else str(budget)]
            + [line.get(task, "-") for task in tasks]
            for (policy, budget), line in lines.items()
        ),
    ]


def text_table(lines: Table) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(part.rjust(width) for part, width in zip(line, widths, strict=True))
        for line in lines
    )


def markdown_table(lines: Table) -> str:
    """A table for a page."""
    head, *body = lines
    return "\n".join(
        "| " + " | ".join(line) + " |" if line else "|" + "---|" * len(head)
        for line in (head, [], *body)
    )


def text(rows: Sequence[Row]) -> str:
    """Accuracy at each length, for the terminal."""
    parts = []
    for length in dict.fromkeys(row["length"] for row in rows):
        own = [row for row in rows if row["length"] == length]
        parts.append(f"{length} tokens\n{text_table(table(own, score_cell))}")
        compared = [row for row in own if row["kl"] is not None]
        if compared:
            parts.append(f"KL divergence\n{text_table(table(compared, kl_cell))}")
    return "\n\n".join(parts)


def markdown(run: dict[str, Any], rows: Sequence[Row], images: Path) -> str:
    """The page; writes its plots to ``images``, a folder beside it."""
    counts = sorted({row["n"] for row in rows})
    numbers = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        "# Accuracy of pruned prompts",
        f"Model {run['model']}; {run['split']} prompts of seed {run['seed']}, "
        f"{numbers} for each number. Written by `python -m benchmarks.accuracy`. In "
        "brackets: Wilson's interval of 95%.",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        own = [row for row in rows if row["length"] == length]
        parts += [
            f"## Prompts of {length} tokens",
            "Accuracy:",
            markdown_table(table(own, score_cell)),
        ]
        compared = [row for row in own if row["kl"] is not None]
        if compared:
            parts += [
                "Tasks without a right answer: accuracy is the share of the unpruned "
                "model's own tokens that are still the likeliest. Mean KL divergence "
                "from its predictions, in nats a token:",
                markdown_table(table(compared, kl_cell)),
            ]
        choosing = [row for row in own if set(row["layers"]) != {"none"}]
        if choosing:
            parts += [
                "Selection layers, counted from 0: the median, the range, and the "
                "share of prompts for which no layer was selected:",
                markdown_table(table(choosing, layer_cell)),
            ]
        if any(row["work"] is not None for row in own):
            name = f"accuracy-{length}.png"
            plot(own, images / name)
            parts += [
                "Work: token-layers that the prefill computes, as a share of an "
                "unpruned one's. What a control spends is what it sends:",
                markdown_table(table(own, work_cell)),
                f"![Accuracy against work, {length} tokens]({images.name}/{name})",
            ]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against work as PNG: a panel for each task, a line for each policy."""
    pyplot = plots.pyplot()

    rows = [row for row in rows if row["work"] is not None]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    policies = [p for p in dict.fromkeys(row["policy"] for row in rows) if p != FULL]
    across = 2 if len(tasks) == 4 else min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure, grid = pyplot.subplots(
        down,
        across,
        figsize=(3.4 * across + 1.6, 3.0 * down),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    colours = pyplot.get_cmap("tab10")
    for axes, task in zip(grid.flat, tasks, strict=False):
        own = [row for row in rows if row["task"] == task]
        for row in (row for row in own if row["policy"] == FULL):
            axes.axhline(row["score"], color="0.6", linewidth=1, label=FULL)
        for number, policy in enumerate(policies):
            points = sorted(
                (row["work"], row["score"], row["low"], row["high"])
                for row in own
                if row["policy"] == policy
            )
            if not points:
                continue
            x, y, low, high = (list(values) for values in zip(*points, strict=True))
            bars = [
                [a - b for a, b in zip(y, low, strict=True)],
                [b - a for a, b in zip(y, high, strict=True)],
            ]
            # Rounding may put a mean of 1 a hair outside its own interval.
            bars = [[max(0.0, value) for value in side] for side in bars]
            axes.errorbar(
                x,
                y,
                yerr=bars,
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1,
                color=colours(number % 10),
                linestyle=("-", "--", ":")[number // 10 % 3],
                label=policy,
            )
        axes.set_title(task)
        axes.tick_params(labelbottom=True)
        axes.set_ylim(-0.03, 1.03)
    figure.supxlabel("token-layers / unpruned")
    figure.supylabel("accuracy")
    handles = {
        name: handle
        for axes in grid.flat[: len(tasks)]
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", frameon=False
    )
    plots.save(figure, path)
