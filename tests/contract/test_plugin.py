"""How vLLM loads asl_vllm, and the version it must be."""

from __future__ import annotations

import importlib.metadata
import logging

import vllm
from vllm import plugins
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.math_utils import cdiv
from vllm.utils.mem_utils import format_gib
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerWrapperBase

from asl_vllm.engine import lines
from tests.contract.looking import in_order, source


def test_version() -> None:
    found = lines.installed()
    assert found is not None
    public, _, _ = found[1].partition("+")
    assert public == vllm.__version__.partition("+")[0]
    lines.check_installed()


def test_general_plugins_are_loaded_in_every_process() -> None:
    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    points = importlib.metadata.entry_points(group=plugins.DEFAULT_PLUGINS_GROUP)
    assert points["asl_vllm"].value == "asl_vllm.plugin:register"
    for place in (
        EngineArgs.__post_init__,
        EngineCore.__init__,
        WorkerWrapperBase.init_worker,
    ):
        assert "load_general_plugins()" in source(place), place


def test_plugins_are_loaded_before_options_are_declared() -> None:
    assert in_order(
        source(AsyncEngineArgs.add_cli_args),
        "load_general_plugins()",
        "EngineArgs.add_cli_args(parser)",
    )


def test_a_worker_is_named_after_plugins_are_loaded() -> None:
    """The class may come from a plugin."""
    assert in_order(
        source(WorkerWrapperBase.init_worker),
        "load_general_plugins()",
        "resolve_obj_by_qualname(parallel_config.worker_cls)",
    )


def test_small_utilities() -> None:
    assert [cdiv(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert format_gib(3 << 29) == "1.5"
    assert resolve_obj_by_qualname("vllm.utils.math_utils.cdiv") is cdiv
    assert isinstance(init_logger("asl_vllm"), logging.Logger)
