"""``python -m benchmarks.accuracy.digest RESULTS``: a study's results in short.

Reads the JSON that ``python -m benchmarks.accuracy --output`` writes, asks nothing,
and prints the Markdown tables that docs/accuracy.md and the model card quote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import mean

from benchmarks.accuracy.cells import CellError, parse_budget, tokens_of
from benchmarks.accuracy.report import Table, markdown_table, plot, score_cell, table
from benchmarks.accuracy.summary import Row


def _span(texts: Sequence[str]) -> str:
    """Lowest and highest of sorted texts; one where they do not differ."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _per_cent(scores: Sequence[float]) -> str:
    return _span([f"{round(100 * score, 1):g}" for score in sorted(scores)])


def _work(rows: Sequence[Row]) -> str:
    works = sorted(row["work"] for row in rows if row["work"] is not None)
    return _span([f"{work:.2f}" for work in works]) if works else "-"


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def at_budget(rows: Sequence[Row], budget: Fraction | int) -> Table:
    """Per cent right at one budget, and the least and most work of a task."""
    tasks = _tasks(rows)
    lines: dict[tuple[int, int, str], dict[str, Row]] = {}
    for row in rows:
        tokens = tokens_of(budget, row["length"])
        if row["budget"] in (None, tokens):
            key = (row["length"], tokens, row["policy"])
            lines.setdefault(key, {})[row["task"]] = row
    return [
        ["tokens", "kept", "policy", *tasks, "work"],
        *(
            [str(length), str(tokens), policy]
            + [_per_cent([own[t]["score"]]) if t in own else "-" for t in tasks]
            + [_work(list(own.values()))]
            for (length, tokens, policy), own in lines.items()
        ),
    ]


def over_budgets(rows: Sequence[Row], task: str) -> Table:
    """Per cent right of a task, from the worst to the best budget."""
    rows = [row for row in rows if row["task"] == task]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        own = lines.setdefault(row["policy"], {})
        own.setdefault(row["length"], []).append(row["score"])
    return [
        [f"policy, {task}", *(str(length) for length in lengths)],
        *(
            [policy, *(_per_cent(own[n]) if n in own else "-" for n in lengths)]
            for policy, own in lines.items()
        ),
    ]


def mean_layers(rows: Sequence[Row]) -> Table:
    """The mean selection layer of asl, and how many prompts had none."""
    tasks = _tasks(rows)
    lines: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        if row["policy"] == "asl":
            key = (row["length"], row["budget"])
            lines.setdefault(key, {})[row["task"]] = _mean_layer(row)
    return [
        ["tokens", "kept", *tasks],
        *(
            [str(length), str(kept), *(own.get(task, "-") for task in tasks)]
            for (length, kept), own in lines.items()
        ),
    ]


def _mean_layer(row: Row) -> str:
    layers = dict(row["layers"])
    none = layers.pop("none", 0)
    chosen = [int(layer) for layer, count in layers.items() for _ in range(count)]
    text = f"{mean(chosen):.1f}" if chosen else "-"
    return f"{text}, {none} none" if none else text


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables of one file of results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.digest",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("results", type=Path, help="the JSON of a study")
    parser.add_argument(
        "--budgets", default="1/8", help="tokens kept, or shares of the length"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="instead of tables of budgets: scores with intervals, and a plot of them "
        "against work; for results of one length",
    )
    args = parser.parse_args(argv)
    try:
        budgets = [parse_budget(text) for text in args.budgets.split(",")]
    except CellError as error:
        parser.error(f"--budgets: {error}")
    rows: list[Row] = json.loads(args.results.read_text())["cells"]
    if args.plot:
        if len({row["length"] for row in rows}) > 1:
            parser.error("--plot: got results of several lengths; allowed: of one")
        plot(rows, args.plot)
        print(markdown_table(table(rows, score_cell)))
        return
    tables = [at_budget(rows, budget) for budget in budgets]
    tables += [over_budgets(rows, task) for task in _tasks(rows)]
    tables += [mean_layers(rows)] if any(r["policy"] == "asl" for r in rows) else []
    print("\n\n".join(markdown_table(table) for table in tables))


if __name__ == "__main__":
    main()
