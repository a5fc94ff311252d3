"""``python -m benchmarks.accuracy``: how right answers are under KV-cache budgets.

Asks a server, or servers that it starts, the same prompts under several policies and
budgets. Replies are kept in a file of lines beside ``--output``, from which an
interrupted run goes on (``--resume``) and pages are written (``--render``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.accuracy import direct, report
from benchmarks.accuracy.cells import (
    CellError,
    cells,
    check_policies,
    parse_budget,
    tokens_of,
)
from benchmarks.accuracy.client import Client, Served, ServerError
from benchmarks.accuracy.prompts import SPLITS, PromptMaker
from benchmarks.accuracy.replies import Replies, read
from benchmarks.accuracy.run import Plan, ask_all
from benchmarks.accuracy.servers import started
from benchmarks.accuracy.summary import summary
from benchmarks.accuracy.tasks import GROUPS, TASKS
from benchmarks.accuracy.tokens import HubTokenizer

URL = "http://localhost:8000"
POLICIES = "full,snapkv,fastkv,gemfilter,pyramidinfer,asl,recency,random"
RULE_OPTIONS = (
    *("window", "pool_kernel", "reach", "score_layers", "l_min", "l_obs", "tau"),
    *("propagated_share", "decay_ratio"),
)
"""Options of a server that decide which tokens a policy keeps, but for the fixed
selection layer, which is in a policy's label."""
POOLED = ("snapkv", "fastkv", "asl")
"""Policies that read ``pool_kernel``."""
SWEPT = ("fastkv", "asl")
"""Policies that can be asked with several layers fixed in turn: fastkv instead of its
own fixed layer, asl beside the layers that it chooses."""


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=(__doc__ or "").split(": ", 1)[1].splitlines()[0],
    )
    add = parser.add_argument
    add("--base-url", help=f"of the server to ask; {URL} if left out")
    add("--api-key", help="OPENAI_API_KEY if left out")
    add("--model", help="its name; the server's only one if left out")
    add("--start", metavar="MODEL", help="start servers of this model instead")
    add("--serve-args", default="", help="with --start: options of vllm serve")
    add(
        "--direct",
        metavar="MODEL",
        help="no server: answers of a small Qwen3 or Llama model computed in PyTorch, "
        "--concurrency processes at a time",
    )
    add("--block-size", type=int, help="with --direct: tokens a KV block, 32")
    add("--device", help="with --direct: cpu, the default, or cuda")
    add(
        "--pool-kernels",
        default="",
        metavar="S,S",
        help="with --direct: ask snapkv, fastkv and asl under these poolings, too",
    )
    add(
        "--policy-config",
        default="{}",
        help="with --start or --direct: --kv-policy-config",
    )
    for policy in SWEPT:
        add(
            f"--{policy}-layers",
            default="",
            metavar="L,L",
            help=f"likewise: ask {policy} with these layers fixed, a server for each",
        )
    add("--tokenizer", help="folder or name; the server's model if left out")
    add(
        "--template",
        default="none",
        help="none, chat, or a text with {task} in the question's place",
    )
    names = ", ".join([*GROUPS, *TASKS])
    add("--tasks", default="ruler", help=f"of {names}")
    add("--lengths", default="4096", help="tokens of prompt and answer together")
    add("--budgets", default="2048", help="tokens kept, or shares of the length: 1/8")
    add("--policies", default=POLICIES, help=f"of {POLICIES}; the last two: controls")
    add("--n", type=int, default=200, help="prompts for each task and length")
    add("--concurrency", type=int, default=8, help="requests under way at once")
    add("--seed", type=int, default=0)
    add("--split", choices=SPLITS, default="test", help="tuning: to choose settings")
    add("--output", type=Path, required=True, help="file for the results as JSON")
    add("--page", type=Path, help="file for the results as Markdown, with plots")
    add("--resume", action="store_true", help="keep the replies that are there")
    add("--render", action="store_true", help="only write files, from the replies")
    args = parser.parse_args(arguments)
    args.tasks = [
        name for part in args.tasks.split(",") for name in GROUPS.get(part, [part])
    ]
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        parser.error(f"--tasks: got {', '.join(unknown)}; allowed: {names}")
    args.policies = args.policies.split(",")
    try:
        args.lengths = [int(text) for text in args.lengths.split(",")]
        args.swept = {
            policy: [int(text) for text in layers.split(",")]
            for policy in SWEPT
            if (layers := getattr(args, f"{policy}_layers"))
        }
        args.pool_kernels = [int(s) for s in args.pool_kernels.split(",") if s]
        args.budgets = [parse_budget(text) for text in args.budgets.split(",")]
        args.policy_config = json.loads(args.policy_config)
    except ValueError as error:
        parser.error(str(error))
    for name in ("n", "concurrency"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}; allowed: at least 1")
    without_effect = list(_without_effect(args))
    if without_effect:
        parser.error("; ".join(without_effect))
    args.base_url = args.base_url or URL
    args.api_key = args.api_key or os.environ.get("OPENAI_API_KEY", "none")
    args.block_size = args.block_size or direct.BLOCK_SIZE
    args.device = args.device or "cpu"
    return args


def _without_effect(args: argparse.Namespace) -> Iterator[str]:
    """What was given but would do nothing."""
    own = "a running server has its own"
    if args.start and args.direct:
        yield "--start and --direct: one of them, servers or none"
    if args.serve_args and not args.start:
        yield f"--serve-args needs --start: {own}"
    if args.block_size and not args.direct:
        yield f"--block-size needs --direct: {own}"
    for name in ("device", "pool_kernels"):
        if getattr(args, name) and not args.direct:
            yield f"--{name.replace('_', '-')} needs --direct: {own}"
    if not (args.start or args.direct) and (args.swept or args.policy_config):
        yield (
            "--fastkv-layers, --asl-layers and --policy-config need --start or "
            f"--direct: {own}"
        )
    for policy in args.swept:
        if policy not in args.policies:
            yield f"--{policy}-layers: {policy} is not in --policies"
    if args.direct:
        for name in ("base_url", "api_key", "model", "tokenizer"):
            if getattr(args, name):
                yield f"--{name.replace('_', '-')} goes with a server, not --direct"


def replies_path(output: Path) -> Path:
    """The file of replies that belongs to ``--output``."""
    return output.with_suffix(".jsonl")


def servers(args: argparse.Namespace) -> Iterator[tuple[Any, list[str]]]:
    """Context managers of base URLs, and the policies to ask each about."""
    if args.direct:
        return
    if not args.start:
        yield _running(args.base_url), args.policies
        return
    options = shlex.split(args.serve_args)
    log = args.output.with_suffix(".server.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    for config, policies in configurations(args):
        yield started(args.start, options, config, log), policies


def configurations(
    args: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A ``--kv-policy-config`` for each server needed, and the policies asked there."""
    replaced = [policy for policy in args.swept if policy != "asl"]
    others = [policy for policy in args.policies if policy not in replaced]
    if others:
        yield args.policy_config, others
    for policy, layers in args.swept.items():
        for layer in layers:
            yield {**args.policy_config, "selection_layer": layer}, [policy]


@contextmanager
def _running(url: str) -> Iterator[str]:
    yield url


def run_of(args: argparse.Namespace, served: Served) -> dict[str, Any]:
    """What all replies of one file have in common."""
    return {
        "model": served.model,
        "num_layers": served.num_layers,
        "template": args.template,
        "seed": args.seed,
        "split": args.split,
        "block_size": served.block_size,
        "rule": {k: served.config[k] for k in RULE_OPTIONS if k in served.config},
    }


async def measure(
    args: argparse.Namespace, url: str, policies: list[str], resume: bool
) -> list[str]:
    """Asks one server; returns what went wrong."""
    client = Client(url, args.api_key)
    try:
        served = await client.served(args.model)
        check_policies(policies, served)
        _say_what_is_left_out(args, served)
        tokenizer = HubTokenizer(args.tokenizer or served.root, args.template)
        maker = _prompt_maker(args, tokenizer)
        replies = Replies(
            replies_path(args.output), run_of(args, served), resume=resume
        )
        plan = Plan(
            args.tasks, args.lengths, policies, args.budgets, args.n, args.concurrency
        )
        return await ask_all(client, served, maker, tokenizer.bos, plan, replies)
    finally:
        await client.close()


def _prompt_maker(args: argparse.Namespace, tokenizer: HubTokenizer) -> PromptMaker:
    """Writes a prompt of each kind, so that a length that is too short raises now."""
    maker = PromptMaker(tokenizer, split=args.split, seed=args.seed)
    for task in args.tasks:
        for length in args.lengths:
            maker.prompt(TASKS[task], length, 0)
    return maker


def measure_directly(args: argparse.Namespace) -> None:
    """Answers all of it in this process and its children."""
    made = [
        direct.variant(args.direct, args.block_size, config, policies)
        for config, policies in configurations(args)
    ]
    made += [
        direct.variant(
            args.direct,
            args.block_size,
            {**config, "pool_kernel": size},
            [policy for policy in policies if policy in POOLED],
            f" pooled {size}",
        )
        for size in args.pool_kernels
        for config, policies in configurations(args)
    ]
    served = made[0].served
    _say_what_is_left_out(args, served)
    _prompt_maker(args, HubTokenizer(args.direct, args.template))
    replies = Replies(
        replies_path(args.output), run_of(args, served), resume=args.resume
    )
    plan = Plan(
        args.tasks, args.lengths, args.policies, args.budgets, args.n, args.concurrency
    )
    source = direct.Source(
        args.direct, args.template, args.split, args.seed, args.device
    )
    direct.answer_all(source, plan, made, replies)


def _say_what_is_left_out(args: argparse.Namespace, served: Served) -> None:
    longest = served.max_model_len
    for length in args.lengths:
        if longest is not None and length > longest:
            raise CellError(
                f"lengths: got {length}; allowed: up to the server's max_model_len, "
                f"{longest}"
            )
        asked = {cell.budget for cell in cells(["asl"], args.budgets, length, served)}
        for budget in args.budgets:
            tokens = tokens_of(budget, length)
            if tokens not in asked:
                print(
                    f"{length} tokens: budget {budget} is left out: {tokens} tokens, "
                    f"not in {served.minimum_budget} to {length - 1}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or renders; 1 if requests failed."""
    args = parse_args(arguments)
    failures: list[str] = []
    if not args.render:
        try:
            if args.direct:
                measure_directly(args)
            for number, (server, policies) in enumerate(servers(args)):
                with server as url:
                    failures += asyncio.run(
                        measure(args, url, policies, args.resume or number > 0)
                    )
        except (CellError, ServerError, ValueError, RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
    run, records = read(replies_path(args.output))
    rows = summary(records)
    results = {"run": run, "cells": rows, "failed": len(failures)}
    results_file.write(args.output, results)
    if rows:
        print(report.text(rows))
        if args.page:
            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(
                report.markdown(run, rows, args.page.parent / "images")
            )
    for failure in failures[:10]:
        print(failure, file=sys.stderr)
    if failures:
        message = f"{len(failures)} requests failed; --resume asks them again"
        print(message, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
