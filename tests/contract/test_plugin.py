"""How vLLM loads asl_vllm, and the version it must be."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import pytest
import vllm
from vllm import plugins
from vllm.engine import arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.logger import init_logger
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.math_utils import cdiv
from vllm.utils.mem_utils import format_gib
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerWrapperBase

from asl_vllm.engine import lines
from asl_vllm_testing.vllm_configs import engine_args, engine_config


def test_version() -> None:
    found = lines.installed()
    assert found is not None
    public, _, _ = found[1].partition("+")
    assert public == vllm.__version__.partition("+")[0]
    lines.check_installed()


def test_general_plugins_are_found_by_the_entry_point() -> None:
    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    points = importlib.metadata.entry_points(group=plugins.DEFAULT_PLUGINS_GROUP)
    assert points["asl_vllm"].value == "asl_vllm.plugin:register"


class Loading(Exception):
    """What a process does first has been reached."""


def test_every_process_loads_plugins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Front ends, where arguments are made; the engine core; workers."""

    def load() -> None:
        raise Loading

    monkeypatch.setattr(plugins, "load_general_plugins", load)
    monkeypatch.setattr(arg_utils, "load_general_plugins", load, raising=False)
    with pytest.raises(Loading):
        engine_args()
    monkeypatch.undo()
    config = engine_config()
    monkeypatch.setattr(plugins, "load_general_plugins", load)
    with pytest.raises(Loading):
        EngineCore(config, Any, log_stats=False)
    # Before the worker's class is looked for, which may come from a plugin.
    config.parallel_config.worker_cls = "no_module.of_this.Name"
    with pytest.raises(Loading):
        WorkerWrapperBase().init_worker([{"vllm_config": config}])


def test_plugins_are_loaded_before_options_are_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    declare = EngineArgs.add_cli_args

    def note(parser: Any) -> Any:
        calls.append("options")
        return declare(parser)

    monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(note))
    monkeypatch.setattr(
        arg_utils, "load_general_plugins", lambda: calls.append("plugins")
    )
    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert calls[:2] == ["plugins", "options"]


def test_small_utilities() -> None:
    assert [cdiv(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert format_gib(3 << 29) == "1.5"
    assert resolve_obj_by_qualname("vllm.utils.math_utils.cdiv") is cdiv
    assert isinstance(init_logger("asl_vllm"), logging.Logger)
