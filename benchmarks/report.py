"""Results as tables (text and Markdown) and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.experiments import EXPERIMENTS

Row = dict[str, Any]


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text_table(name: str, rows: Sequence[Row]) -> str:
    """A table for the terminal."""
    columns = EXPERIMENTS[name].COLUMNS
    lines = [columns, *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(part.rjust(width) for part, width in zip(line, widths, strict=True))
        for line in lines
    )


def title_and_text(name: str) -> tuple[str, str]:
    """An experiment's title and what it does, from its docstring."""
    title, _, text = (EXPERIMENTS[name].__doc__ or "").partition("\n\n")
    return title.rstrip("."), " ".join(text.split())


def common_and_table(name: str, rows: Sequence[Row]) -> tuple[str, str]:
    """What all rows of several share, in words, and a Markdown table of the rest."""
    cells = {c: [cell(row.get(c)) for row in rows] for c in EXPERIMENTS[name].COLUMNS}
    common = [c for c in cells if len(rows) > 1 and len(set(cells[c])) == 1]
    columns = [c for c in cells if c not in common]
    shared = ", ".join(f"{c} {cells[c][0]}" for c in common)
    return shared, markdown_table(columns, rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table for a page."""
    lines = [columns, *([cell(row.get(c)) for c in columns] for row in rows)]
    head, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(columns), *rest])


def markdown(
    results: dict[str, Any],
    images: Path,
    relative: str,
    peer: dict[str, Any] | None = None,
) -> str:
    """The page of results; writes its plots to ``images``.

    ``peer`` is what `benchmarks.peer` wrote, if it ran.
    """
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    parts = [
        "# Results",
        "Written by `make bench`, which runs stock vLLM and asl_vllm in turn, on the "
        "same random-weight model, prompts and KV pool. Ratios are ours / stock, "
        "medians over rounds.",
        f"Machine: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['dtype']}, {machine['scale']} sizes; {versions}; {machine['date']}.",
    ]
    for name in EXPERIMENTS:
        if not (rows := results["experiments"].get(name)):
            continue
        title, text = title_and_text(name)
        common, table = common_and_table(name, rows)
        text += f" Every row: {common}." * bool(common)
        if was := results.get("earlier", {}).get(name):
            text += f" Measured {was['date']} with asl_vllm {was['asl_vllm']}."
        parts += [f"## {title}", text, table]
        if hasattr(EXPERIMENTS[name], "PLOT"):
            plot(name, rows, images / f"{name}.png")
            parts.append(f"![{title}]({relative}/{name}.png)")
    if peer:
        text = (
            f"`python -m benchmarks.peer`: SmolLM2 135M, prompts of {peer['tokens']} "
            f"tokens of natural text, {peer['kept']} of them kept in each layer, "
            f"{peer['more_tokens']} tokens after the first. One request alone (medians "
            f"of {peer['rounds']}), then several at once, for kvpress as one batch. "
            f"{', '.join(peer['kvpress'])}; {peer['date']}."
        )
        table = markdown_table(tuple(peer["rows"][0]), peer["rows"])
        parts += ["## Beside kvpress", text, table]
    return "\n\n".join(parts) + "\n"


def plot(name: str, rows: Sequence[Row], path: Path) -> None:
    """A line plot of an experiment as PNG."""
    pyplot = plots.pyplot()

    axes_of = EXPERIMENTS[name].PLOT
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for line in dict.fromkeys(row[axes_of["line"]] for row in rows):
        own = [row for row in rows if row[axes_of["line"]] == line]
        found = [row for row in own if row[axes_of["y"]] is not None]
        points = sorted((row[axes_of["x"]], row[axes_of["y"]]) for row in found)
        label = line if isinstance(line, str) else f"{axes_of['line']} {line}"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    if axes_of["y"] == "ratio":
        axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({row[axes_of["x"]] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(axes_of["x"])
    axes.set_ylabel("ours / stock" if axes_of["y"] == "ratio" else axes_of["y"])
    axes.set_title(title_and_text(name)[0])
    axes.legend(frameon=False)
    plots.save(figure, path)
