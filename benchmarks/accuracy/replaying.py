"""``python -m benchmarks.accuracy.replaying FOLDER``: settings on recorded prompts.

What asl would have kept of the prompts that `benchmarks.accuracy.recording` recorded,
under every combination of the settings given, without the model: the share of the
answer's attention to its place in the prompt that falls on kept tokens, the share of
prompts with nine tenths of it, the layers selected and the work. A token that was
dropped cannot be read, so the first bounds what an answer can say; what was kept may
still be misread.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asl_kernels.window_scores.reference import reaching
from asl_vllm.config import AslConfig
from asl_vllm.selection import decide, make_policy
from benchmarks.accuracy.recording import WINDOWS, Recording

FEW = ("policy", "window", "pool_kernel", "reach", "score_layers")
RULE = ("selection_layer", "l_min", "l_obs", "tau")


@dataclass(frozen=True)
class Outcome:
    """What a setting makes of a prompt."""

    read: float
    """Share of the answer's attention to its place that falls on kept tokens."""
    layer: int | None
    work: float
    """Token-layers computed, as a share of an unpruned prefill's."""


def replayed(recording: Recording, config: AslConfig, kept: int) -> Outcome:
    """Asks the policy about each layer, up to the one that drops tokens.

    Deeper layers keep what that one sends them, as they would.

    Raises:
        ValueError: The prompt's place of the answer or the window is not recorded.
    """
    if config.window not in WINDOWS or not len(recording.spans):
        raise ValueError(
            f"window, spans: got {config.window} and {len(recording.spans)}; wanted "
            f"one of {WINDOWS}, and at least one."
        )
    layers, _, tokens = recording.asked.shape
    policy = make_policy(config.policy, config, num_layers=layers, kept_tokens=kept)
    wanted = torch.zeros(tokens)
    for begin, end in recording.spans.tolist():
        wanted[begin:end] = 1
    asked = recording.asked * wanted
    read, layer = 0.0, None
    kept_tokens: Tensor | None = None
    for index, seen in enumerate(recording.seen[WINDOWS.index(config.window)]):
        if layer is None:
            scores = reached(seen[:, : tokens - config.window], config)
            decision = decide(policy, index, tokens, scores.sum(0), scores)
            assert isinstance(decision.kept, Tensor)
            kept_tokens = decision.kept
        assert kept_tokens is not None
        read += asked[index].gather(-1, kept_tokens).sum().item()
        if layer is None and isinstance(decision.deeper, Tensor):
            layer, kept_tokens = index, decision.deeper.expand(len(asked[index]), -1)
    deeper = 0 if layer is None else (layers - layer - 1) * (1 - kept / tokens)
    return Outcome(read / asked.sum().item(), layer, 1 - deeper / layers)


def reached(scores: Tensor, config: AslConfig) -> Tensor:
    """Pooled scores, as `asl_kernels.window_scores` makes them of attention."""
    size = config.pool_kernel
    pooled = F.avg_pool1d(scores, size, 1, padding=size // 2)
    return reaching(pooled, config.reach)


def configs(options: dict[str, list[Any]]) -> Iterator[AslConfig]:
    """Every combination of the values given."""
    for values in itertools.product(*options.values()):
        yield AslConfig.from_dict(dict(zip(options, values, strict=True)))


def rows(
    recordings: dict[str, list[Recording]], made: Sequence[AslConfig], share: float
) -> Iterator[str]:
    """Markdown: a row a setting, and in it a kind of prompts a column."""
    names = sorted(recordings)
    heads = [*FEW, *RULE, *(f"{n} ({len(recordings[n])})" for n in names)]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for config in made:
        cells = [str(getattr(config, name)) for name in (*FEW, *RULE)]
        for name in names:
            found = [
                replayed(one, config, int(share * one.asked.shape[-1]))
                for one in recordings[name]
            ]
            enough = fmean(one.read >= 0.9 for one in found)
            chosen = [one.layer for one in found if one.layer is not None]
            at = f"{min(chosen)}-{max(chosen)}" if chosen else "-"
            none = len(found) - len(chosen)
            cells.append(
                f"{fmean(one.read for one in found):.2f}, {enough:.2f}; {at}"
                f"{f', {none} none' if none else ''}; "
                f"{fmean(one.work for one in found):.2f}"
            )
        yield "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.replaying")
    add = parser.add_argument
    add("folder", type=Path, help="of recordings")
    add("--kinds", nargs="*", help="TASK-LENGTH of prompts; all that are there")
    add("--share", type=float, default=1 / 8, help="of the prompt that is kept")
    add(
        "--options",
        type=json.loads,
        default={},
        help="lists of values, all combinations of which are tried: '{\"reach\": [1]}'",
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[Recording]] = {}
    for path in sorted(args.folder.glob("*.safetensors")):
        kind = path.stem.rpartition("-")[0]
        if not args.kinds or kind in args.kinds:
            found.setdefault(kind, []).append(Recording.load(path))
    made = list(configs({"policy": ["asl"], **args.options}))
    print("\n".join(rows(found, made, args.share)))


if __name__ == "__main__":
    main()
