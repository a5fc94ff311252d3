"""The options of the vllm command, through vLLM's own parser."""

from __future__ import annotations

import argparse
import pickle
import re
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from asl_vllm import plugin
from asl_vllm.config import POLICY_NAMES, AslConfig
from asl_vllm.engine import settings
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.moved import make_arg_parser
from asl_vllm_testing.originals import original_of
from asl_vllm_testing.vllm_configs import engine_args


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    plugin.register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.fixture(scope="module")
def serve_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm serve``."""
    plugin.register()
    return make_arg_parser(FlexibleArgumentParser())


def parsed(parser: FlexibleArgumentParser, *options: str) -> argparse.Namespace:
    return parser.parse_args(["--model", str(TINY_MODEL), *options])


def carried(parser: FlexibleArgumentParser, *options: str) -> Any:
    """`AslConfig` options that the engine would get; None for none."""
    args = EngineArgs.from_cli_args(parsed(parser, *options))
    return args.additional_config.get("asl_vllm")


def refusal(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    """What the command prints when it refuses these options."""
    with pytest.raises(SystemExit) as refused:
        parsed(parser, *options)
    assert refused.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_configs(parser: FlexibleArgumentParser) -> None:
    args = parsed(parser)
    assert args.kv_policy == AslConfig().policy == "none"
    assert args.kv_budget is AslConfig().budget is None
    assert AslConfig.from_dict(args.kv_policy_config) == AslConfig()


def test_without_options_nothing_is_carried(parser: FlexibleArgumentParser) -> None:
    assert EngineArgs.from_cli_args(parsed(parser)).additional_config == {}
    assert carried(parser, "--kv-policy", "none") is None


@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name != "none"])
def test_a_policy_alone(parser: FlexibleArgumentParser, policy: str) -> None:
    assert carried(parser, "--kv-policy", policy) == AslConfig(policy=policy).to_dict()


@pytest.mark.parametrize(
    ("text", "budget"),
    [("2048", 2048), ("0.25", 0.25), ("1.0", 1.0), ("none", None), ("NULL", None)],
)
def test_budgets(
    parser: FlexibleArgumentParser, text: str, budget: int | float | None
) -> None:
    config = carried(parser, "--kv-policy", "asl", "--kv-budget", text)
    assert config["budget"] == budget
    assert type(config["budget"]) is type(budget)


def test_bands(parser: FlexibleArgumentParser) -> None:
    assert carried(parser, "--kv-policy", "asl")["bands"] == AslConfig().bands == 1
    assert carried(parser, "--kv-policy", "asl", "--kv-bands", "4")["bands"] == 4


def test_policy_options(parser: FlexibleArgumentParser) -> None:
    options = '{"window": 16, "tau": 0.5, "selection_layer": 3}'
    config = carried(parser, "--kv-policy", "asl", "--kv-policy-config", options)
    want = AslConfig(policy="asl", window=16, tau=0.5, selection_layer=3)
    assert config == want.to_dict()


def test_policy_options_one_by_one(parser: FlexibleArgumentParser) -> None:
    """vLLM's own way to write JSON options."""
    config = carried(
        parser,
        *("--kv-policy", "asl", "--kv-policy-config.window", "16"),
        *("--kv-policy-config.tau", "0.5"),
    )
    assert config == AslConfig(policy="asl", window=16, tau=0.5).to_dict()


def test_underscores_for_dashes(parser: FlexibleArgumentParser) -> None:
    assert carried(parser, "--kv_policy", "asl", "--kv_budget=64")["budget"] == 64


def test_other_additional_config_stays(parser: FlexibleArgumentParser) -> None:
    args = parsed(
        parser, "--kv-policy", "asl", "--additional-config", '{"mine": {"a": 1}}'
    )
    carried = EngineArgs.from_cli_args(args).additional_config
    assert carried == {"mine": {"a": 1}, "asl_vllm": AslConfig(policy="asl").to_dict()}


def test_options_in_additional_config_count_too(
    parser: FlexibleArgumentParser,
) -> None:
    """As they do offline: `LLM(additional_config=...)`."""
    text = '{"asl_vllm": {"policy": "asl", "budget": 512}}'
    config = carried(parser, "--additional-config", text)
    assert config == {"policy": "asl", "budget": 512}


def test_the_server_takes_the_options(serve_parser: FlexibleArgumentParser) -> None:
    args = parsed(serve_parser, "--kv-policy", "asl", "--kv-budget", "512")
    config = AsyncEngineArgs.from_cli_args(args).additional_config["asl_vllm"]
    assert config == AslConfig(policy="asl", budget=512).to_dict()


@pytest.mark.parametrize("way", ["command", "offline"])
def test_options_are_parsed_once_in_each_process(
    parser: FlexibleArgumentParser, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    made: list[AslConfig] = []
    check = AslConfig.__post_init__

    def noted(config: AslConfig) -> None:
        made.append(config)
        check(config)

    monkeypatch.setattr(AslConfig, "__post_init__", noted)
    monkeypatch.setattr(settings, "_parsed", None)
    args = engine_args({"policy": "asl", "window": 16})
    if way == "command":
        options = ("--kv-policy", "asl", "--kv-policy-config", '{"window": 16}')
        args = EngineArgs.from_cli_args(parsed(parser, *options, "--max-model-len=256"))
    config = args.create_engine_config()
    config.compute_hash()
    assert settings_of(config).config.window == 16
    assert len(made) == 1
    # As the engine core and the workers get it, new processes.
    monkeypatch.setattr(settings, "_parsed", None)
    theirs = pickle.loads(pickle.dumps(config))
    theirs.compute_hash()
    assert settings_of(theirs).config == made[0]
    assert len(made) == 2


def test_help_can_be_printed(serve_parser: FlexibleArgumentParser) -> None:
    text = serve_parser.format_help()
    for option in ("--kv-policy", "--kv-budget", "--kv-policy-config"):
        assert option in text


def test_a_namespace_without_our_options_passes() -> None:
    """Other code builds namespaces of its own."""
    args = argparse.Namespace(model=str(TINY_MODEL))
    assert EngineArgs.from_cli_args(args).additional_config == {}


def test_an_unknown_policy_is_refused(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(parser, capsys, "--kv-policy", "h2o")
    assert "--kv-policy" in message
    assert "'h2o'" in message
    for name in POLICY_NAMES:
        assert name in message


def test_a_budget_that_is_no_number_is_refused(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(parser, capsys, "--kv-policy", "asl", "--kv-budget", "half")
    assert "--kv-budget: got 'half'" in message
    assert "share of the prompt" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"window": 16', ("not JSON",)),
        ("window", ("not JSON",)),
        ("[1]", ("no JSON object",)),
        ("3", ("no JSON object",)),
        ('{"windows": 16}', ("unknown key(s) windows", "allowed:", "pool_kernel")),
        ('{"window": 0}', ("window: got 0", "1 to 64")),
        ('{"window": "16"}', ("window: got '16'", "an integer")),
        ('{"pool_kernel": 4}', ("pool_kernel: got 4", "odd")),
        ('{"tau": -1}', ("tau: got -1", "at least 0")),
        ('{"tau": NaN}', ("tau: got nan",)),
        ('{"policy": "asl"}', ("'policy'", "--kv-policy")),
        ('{"budget": 5}', ("'budget'", "--kv-budget")),
    ],
)
def test_bad_policy_options_are_refused(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    text: str,
    said: tuple[str, ...],
) -> None:
    message = refusal(parser, capsys, "--kv-policy", "asl", "--kv-policy-config", text)
    assert "argument --kv-policy-config: " in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    "options",
    [
        ("--kv-budget", "512"),
        ("--kv-policy-config", '{"window": 16}'),
        ("--kv-policy", "none", "--kv-budget", "512"),
    ],
)
def test_options_without_a_policy_are_refused(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    message = refusal(parser, capsys, *options)
    assert "no effect without a policy" in message
    assert "add --kv-policy (asl" in message


def test_registering_twice_is_harmless() -> None:
    names = ("add_cli_args", "from_cli_args", "create_engine_config")
    before = [vars(EngineArgs)[name] for name in names]
    originals = [original_of(EngineArgs, name) for name in names]
    plugin.register()
    plugin.register()
    assert [vars(EngineArgs)[name] for name in names] == before
    assert [original_of(EngineArgs, name) for name in names] == originals
    # A second declaration of an option would be an error of argparse.
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args([])
    assert args.kv_policy == "none"


def test_help_lists_the_options_by_their_groups_name(
    serve_parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The parser's class keeps it.
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    with pytest.raises(SystemExit) as ended:
        serve_parser.parse_args(["--help=KVPolicy"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert set(re.findall(r"--kv-[a-z-]+(?= )", said)) >= {
        "--kv-policy",
        "--kv-budget",
        "--kv-bands",
        "--kv-policy-config",
    }
    assert "--model" not in said
