"""The options ``--kv-*`` of the vllm command.

Touch points: wraps ``EngineArgs.add_cli_args`` to declare the options, and carries
them in ``additional_config``, where the offline
`LLM(additional_config={"asl_vllm": {...}})` puts them too: once they are parsed, and
by ``EngineArgs.from_cli_args`` for arguments that were made without a parser.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from asl_vllm.config import CONFIG_KEY, POLICY_NAMES, AslConfig, ConfigError
from asl_vllm.engine.patching import wrap_method
from asl_vllm.engine.settings import parse

_DEFAULT = AslConfig()


def parse_budget_option(text: str) -> int | float | None:
    """Reads ``--kv-budget``: tokens, a share such as 0.25, or ``none``."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; allowed: a number of tokens, a share of the prompt in "
            "(0, 1], or none"
        ) from None


def parse_config_option(text: str) -> dict[str, Any]:
    """Reads ``--kv-policy-config``, a JSON object; `config_of_args` its fields."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError("got no JSON object; pass {...}")
    for key in ("policy", "budget", "bands"):
        if key in options:
            raise argparse.ArgumentTypeError(
                f"{key!r} is not set here; use --kv-{key} instead"
            )
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options; defaults are read from `AslConfig`."""
    group = parser.add_argument_group(
        title="KVPolicy",
        description="KV budgets: requests keep a part of their prompt's KV cache.",
    )
    group.add_argument(
        "--kv-policy",
        choices=POLICY_NAMES,
        default=_DEFAULT.policy,
        help="How to choose the tokens that a kv_budget keeps. A request may name "
        "another policy in kv_policy. 'none' leaves vLLM as it is.",
    )
    group.add_argument(
        "--kv-budget",
        type=parse_budget_option,
        default=_DEFAULT.budget,
        metavar="DEFAULT",
        help="Budget of requests that send no kv_budget: an integer is tokens kept "
        "per layer, a float in (0, 1] is a share of the prompt. Without it, such "
        "requests are not pruned.",
    )
    group.add_argument(
        "--kv-bands",
        type=int,
        default=_DEFAULT.bands,
        metavar="G",
        help="Splits the layers into G bands, each with its own block table, so that "
        'requests may keep every token in shallow layers (kv_shallow "full"). G must '
        "divide the number of layers.",
    )
    group.add_argument(
        "--kv-policy-config",
        type=parse_config_option,
        default={},
        metavar="JSON",
        help="All other options as a JSON object, such as "
        '\'{"window": 32, "l_min": 10, "l_obs": 8, "tau": 0.3}\'; '
        "docs/configuration.md explains each.",
    )


def config_of_args(args: argparse.Namespace) -> AslConfig:
    """The config that parsed options say.

    Raises:
        ConfigError: an option is wrong, or has no effect because no policy is on.
    """
    policy = getattr(args, "kv_policy", _DEFAULT.policy)
    budget = getattr(args, "kv_budget", _DEFAULT.budget)
    bands = getattr(args, "kv_bands", _DEFAULT.bands)
    options = getattr(args, "kv_policy_config", {})
    changed = budget is not None or bands != _DEFAULT.bands or options
    if policy == "none" and changed:
        raise ConfigError(
            "--kv-budget, --kv-bands and --kv-policy-config have no effect without a "
            f"policy; add --kv-policy ({', '.join(POLICY_NAMES[1:])})."
        )
    given = {"policy": policy, "budget": budget, "bands": bands}
    try:
        return parse({**options, **given})
    except ConfigError as error:
        # Of the others the parser takes only what is allowed.
        own = str(error).startswith("bands:")
        option = "--kv-bands" if own else "--kv-policy-config"
        raise ConfigError(f"argument {option}: {error}") from None


def carry(args: argparse.Namespace) -> None:
    """Puts the options of parsed arguments into their ``additional_config``.

    Raises:
        ConfigError: an option is wrong.
    """
    config = config_of_args(args)
    if config.enabled:
        others = getattr(args, "additional_config", None) or {}
        args.additional_config = {**others, CONFIG_KEY: config.to_dict()}


def _carry_when_parsed(parser: argparse.ArgumentParser) -> None:
    """Has a parser `carry` as soon as it has parsed.

    With several API servers vLLM spawns processes that get the parsed arguments and
    make an `EngineArgs` of them before plugins are loaded, which is before
    ``from_cli_args`` is wrapped there.
    """
    original = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        parsed, rest = original(*args, **kwargs)
        try:
            carry(parsed)
        except ConfigError as error:
            parser.error(str(error))
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def declare(parser: argparse.ArgumentParser) -> None:
    """Gives a parser our options and has it `carry` what it parses."""
    add_options(parser)
    _carry_when_parsed(parser)


def install_options(
    declare: Callable[[argparse.ArgumentParser], None] = declare,
) -> None:
    """Wraps ``EngineArgs.add_cli_args``; idempotent."""

    def wrap(original: Any) -> Any:
        def add_cli_args(parser: Any) -> Any:
            parser = original(parser)
            declare(parser)
            return parser

        return add_cli_args

    wrap_method(EngineArgs, "add_cli_args", ("parser",), wrap)


def install() -> None:
    """Wraps the two methods of ``EngineArgs``; idempotent."""

    def wrap(original: Any) -> Any:
        def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> Any:
            carry(args)
            return original(cls, args)

        return from_cli_args

    install_options()
    wrap_method(EngineArgs, "from_cli_args", ("cls", "args"), wrap)
