"""``python -m benchmarks.accuracy.settings MODEL``: which settings suit a model.

For prompts of the tuning split: whether the answer is right with each selection
layer, and how far the ranks had settled by then. From these it follows, for any
L_obs, L_min and tau, which layers asl would have chosen, how right its answers would
have been and what they would have cost; nothing is run again for it. For small Qwen3
and Llama models, as `benchmarks.accuracy.direct`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from asl_kernels.rank_variance import descending_ranks, rank_variance
from asl_vllm.config import AslConfig
from asl_vllm.selection import make_policy
from benchmarks.accuracy.cells import Cell, CellError, cells, parse_budget
from benchmarks.accuracy.direct import DirectModel, variant
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.tasks import GROUPS, TASKS
from benchmarks.accuracy.tokens import HubTokenizer

WINDOW = 8
TAUS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

Trace = dict[str, Any]
"""A prompt at a budget. ``right`` [L + 1]: the score with each selection layer, and
with none. ``variance`` {L_obs: [L]}: of the ranks at each layer; layer 0 has none."""


@dataclass(frozen=True)
class Setting:
    """A rule's numbers, for a model of a given depth."""

    l_obs: int
    l_min: int
    tau: float

    def layer(self, trace: Trace) -> int | None:
        """The layer that the rule selects; None: ranks never settle that far."""
        variance = trace["variance"][str(self.l_obs)]
        first = variance[self.l_min]
        for layer in range(self.l_min + 1, len(variance)):
            settled = variance[layer] < self.tau * first
            if settled or (first == 0 and variance[layer] == 0):
                return layer
        return None


class Tracer:
    """Makes traces; one for each process."""

    def __init__(self, model: str, capacity: int, block_size: int) -> None:
        torch.set_num_threads(1)
        self._path, self._block_size = model, block_size
        self._config = AslConfig(policy="asl", window=WINDOW)
        self._maker = PromptMaker(HubTokenizer(model, "none"), split="tuning", seed=0)
        self._model = DirectModel(model, capacity, self._config.window)

    def traces(self, name: str, length: int, index: int, budget: int) -> Trace:
        """The trace of a prompt at a budget."""
        task = TASKS[name]
        prompt = self._maker.prompt(task, length, index)
        ids, layers = prompt.token_ids, self._model.layers
        layers.begin_prompt(ids)
        right = []
        for layer in [*range(layers.shape.num_layers), None]:
            options = {"window": self._config.window}
            policy = "snapkv" if layer is None else "asl"
            if layer is not None:
                options["selection_layer"] = layer
            made = variant(self._path, self._block_size, options, [policy])
            reply = self._model.reply(
                made,
                Cell(policy, policy, budget),
                ids,
                task.max_tokens,
                prompt.answers[0],
            )
            right.append(task.score(reply.text, prompt.answers))
        kept = made.served.kept(budget, len(ids))
        return {
            "task": name,
            "length": length,
            "index": index,
            "budget": budget,
            "kept": kept,
            "tokens": len(ids),
            "right": right,
            "variance": self._variances(kept),
        }

    @torch.inference_mode()
    def _variances(self, kept: int) -> dict[str, list[float]]:
        layers = self._model.layers
        window, num_layers = self._config.window, layers.shape.num_layers
        policy = make_policy(
            "snapkv", self._config, num_layers=num_layers, kept_tokens=kept
        )
        ranks = []
        for layer, out in enumerate(layers.unpruned_layers()):
            scores = policy.score(
                layer, out.q[-window:], out.k, layers.attention_scale(layer)
            )
            assert scores is not None
            ranks.append(descending_ranks(scores[1]))
        return {
            str(l_obs): [
                rank_variance(
                    torch.stack(ranks[max(0, layer + 1 - l_obs) : layer + 1]),
                    kept - window,
                ).item()
                if layer
                else 0.0
                for layer in range(num_layers)
            ]
            for l_obs in observed(num_layers)
        }


_tracer: Tracer


def _start(*arguments: Any) -> None:
    global _tracer
    _tracer = Tracer(*arguments)


def _work(place: tuple[str, int, int, int]) -> Trace:
    return _tracer.traces(*place)


def work(trace: Trace, layer: int | None) -> float:
    """Share of an unpruned prompt's token-layers that a selection layer leaves."""
    num_layers = len(trace["right"]) - 1
    if layer is None:
        return 1.0
    deeper = (num_layers - layer - 1) * trace["kept"] / trace["tokens"]
    return float(layer + 1 + deeper) / num_layers


def outcome(setting: Setting, traces: Sequence[Trace]) -> dict[str, Any]:
    """How right answers are under a setting, what they cost and the layers chosen."""
    chosen = [setting.layer(trace) for trace in traces]
    found = [layer for layer in chosen if layer is not None]
    pairs = list(zip(traces, chosen, strict=True))
    return {
        "score": fmean(t["right"][-1 if at is None else at] for t, at in pairs),
        "work": fmean(work(t, at) for t, at in pairs),
        "layer": fmean(found) if found else None,
        "never": 1 - len(found) / len(chosen),
    }


def observed(num_layers: int) -> list[int]:
    """The L_obs that are compared, by depth."""
    return sorted({max(2, round(num_layers * s / 32)) for s in (4, 6, 8, 12)})


def settings(num_layers: int) -> Iterator[Setting]:
    """All that are compared, by depth: shares of it are rounded."""
    for l_obs in observed(num_layers):
        for l_min in sorted({max(1, round(num_layers * s / 32)) for s in (4, 7, 10)}):
            for tau in TAUS:
                yield Setting(l_obs, l_min, tau)


def pages(traces: Sequence[Trace]) -> Iterator[str]:
    """Markdown: scores by fixed layer and by setting."""
    num_layers = len(traces[0]["right"]) - 1
    tasks = list(dict.fromkeys(trace["task"] for trace in traces))
    by_task = {name: [t for t in traces if t["task"] == name] for name in tasks}

    def row(label: str, cells: Sequence[str]) -> str:
        return f"| {label} | " + " | ".join(cells) + " |"

    def percent(share: float) -> str:
        return f"{100 * share:.0f}"

    yield "Score (%) with the selection layer fixed:\n"
    heads = [*(str(layer) for layer in range(num_layers)), "none"]
    yield row("task", heads)
    yield "|---" * (len(heads) + 1) + "|"
    for name in tasks:
        columns = zip(*(trace["right"] for trace in by_task[name]), strict=True)
        yield row(name, [percent(fmean(column)) for column in columns])
    yield "\nScore (%) and mean layer by setting:\n"
    yield row("L_obs", ["L_min", "tau", "score", "work", "never selects", *tasks])
    yield "|---" * (len(tasks) + 6) + "|"
    for setting in settings(num_layers):
        whole = outcome(setting, traces)
        each = [outcome(setting, by_task[name]) for name in tasks]
        cells = [
            f"{percent(o['score'])} @ {o['layer']:.1f}"
            if o["layer"] is not None
            else f"{percent(o['score'])} @ -"
            for o in each
        ]
        yield row(
            str(setting.l_obs),
            [
                str(setting.l_min),
                str(setting.tau),
                percent(whole["score"]),
                f"{whole['work']:.2f}",
                percent(whole["never"]),
                *cells,
            ],
        )


def _places(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """Task, length, number and budget of each trace; raises `CellError`."""
    served = variant(args.model, args.block_size, {"window": WINDOW}, ["asl"]).served
    assert served.max_model_len is not None
    budgets = [parse_budget(text) for text in args.budgets]
    for length in args.lengths:
        sizes = [cell.budget for cell in cells(["asl"], budgets, length, served)]
        if length > served.max_model_len or len(sizes) < len(budgets):
            raise CellError(
                f"lengths and budgets: got {length} and {' '.join(args.budgets)}; "
                f"allowed: lengths up to {served.max_model_len}, and different budgets "
                f"from {served.minimum_budget} tokens to one less than the length"
            )
        for name in args.tasks:
            for index, size in itertools.product(range(args.n), sizes):
                assert size is not None
                yield name, length, index, size


def main(arguments: Sequence[str] | None = None) -> int:
    """Traces, unless only the tables are asked for, and prints them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.settings")
    add = parser.add_argument
    add("model", help="folder of the model")
    add("--tasks", nargs="+", default=GROUPS["small"], choices=list(TASKS))
    add("--lengths", nargs="+", type=int, default=[512, 2048])
    add("--budgets", nargs="+", default=["1/8"], help="tokens, or shares of the length")
    add("--n", type=int, default=40, help="prompts for each task and length")
    add("--concurrency", type=int, default=2, help="processes")
    add("--block-size", type=int, default=32, help="tokens a KV block")
    add("--output", type=Path, required=True, help="file of traces, a line each")
    add("--render", action="store_true", help="only print the tables")
    args = parser.parse_args(arguments)
    if not args.render:
        try:
            places = list(_places(args))
        except (CellError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pool = ProcessPoolExecutor(
            args.concurrency,
            multiprocessing.get_context("spawn"),
            _start,
            (args.model, max(args.lengths), args.block_size),
        )
        with pool, args.output.open("w") as file:
            for trace in tqdm(pool.map(_work, places), total=len(places)):
                file.write(json.dumps(trace) + "\n")
    traces = [json.loads(line) for line in args.output.read_text().splitlines()]
    print("\n".join(pages(traces)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
