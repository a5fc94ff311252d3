"""`EngineArgs` and the configuration objects that are read or filled in."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import pickle
import signal
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import vllm.envs
from vllm.config import KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli import serve
from vllm.entrypoints.launchers.api_server import entry
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from asl_vllm.engine.connector import AslConnector
from asl_vllm.engine.frontend import connectors
from asl_vllm.engine.frontend.connectors import connector_config
from asl_vllm.engine.multi_connector import AslMultiConnector
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.moved import make_arg_parser
from asl_vllm_testing.originals import original_of
from asl_vllm_testing.scheduler_host import make_host
from asl_vllm_testing.vllm_configs import engine_args, engine_config
from tests.contract.looking import parameters


def test_add_cli_args_is_static_and_takes_the_parser() -> None:
    raw = inspect.getattr_static(EngineArgs, "add_cli_args")
    assert isinstance(raw, staticmethod)
    assert parameters(EngineArgs.add_cli_args) == ("parser",)


def test_from_cli_args_is_a_class_method_of_a_namespace() -> None:
    raw = inspect.getattr_static(EngineArgs, "from_cli_args")
    assert isinstance(raw, classmethod)
    assert parameters(raw.__func__) == ("cls", "args")


def test_processes_get_parsed_arguments_before_plugins_are_loaded() -> None:
    """So the options travel in the arguments themselves, whatever comes with them."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(
        [
            "--model",
            str(TINY_MODEL),
            "--kv-policy",
            "snapkv",
            "--additional-config",
            '{"other": 1}',
        ]
    )
    args = pickle.loads(pickle.dumps(args))
    stock = original_of(EngineArgs, "from_cli_args")
    assert stock is not None
    carried = stock(EngineArgs, args).additional_config
    assert carried["other"] == 1
    assert carried["asl_vllm"]["policy"] == "snapkv"
    assert EngineArgs.from_cli_args(args).additional_config == carried


def test_engine_args_fields() -> None:
    fields = {field.name: field for field in dataclasses.fields(EngineArgs)}
    assert fields["additional_config"].default_factory() == {}  # type: ignore[misc]
    assert fields["kv_transfer_config"].default is None


class Configured(Exception):
    """`create_engine_config` was called."""


async def enter(args: AsyncEngineArgs) -> None:
    async with entry.build_async_engine_client_from_engine_args(args):
        pass


WAYS_IN: dict[str, Callable[[], Any]] = {
    "LLM": lambda: LLMEngine.from_engine_args(EngineArgs(model=str(TINY_MODEL))),
    "AsyncLLM": lambda: AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=str(TINY_MODEL))
    ),
    "a server": lambda: asyncio.run(enter(AsyncEngineArgs(model=str(TINY_MODEL)))),
    "a server without front end": lambda: serve.run_headless(served("--headless")),
    "several front ends": lambda: serve.run_multi_api_server(
        served("--api-server-count", "2", "--port", "0")
    ),
}


def served(*options: str) -> argparse.Namespace:
    """What ``vllm serve`` makes of its arguments."""
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(TINY_MODEL), *options])
    args.api_server_count = args.api_server_count or 1
    return args


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_every_way_in_makes_its_configuration_by_create_engine_config(
    way_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Configured

    monkeypatch.setattr(EngineArgs, "create_engine_config", stop)
    # Theirs stay as they are after the test.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(Configured):
        WAYS_IN[way_in]()


def test_additional_config_reaches_the_configuration() -> None:
    mine = {"somebody": {"x": 1}}
    config = engine_config(additional_config=mine)
    assert isinstance(config, VllmConfig)
    assert config.additional_config == mine


def test_additional_config_that_is_no_dict_is_hashed_by_itself() -> None:
    class Options:
        def __init__(self, hashed: str) -> None:
            self.hashed = hashed

        def compute_hash(self) -> str:
            return self.hashed

    config = engine_config()
    hashes = []
    for options in (Options("a"), Options("a"), Options("b"), {"x": 1}, {"x": 2}):
        config.additional_config = options
        hashes.append(config.compute_hash())
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_kv_transfer_config_fields() -> None:
    config = connector_config()
    assert isinstance(config, KVTransferConfig)
    assert "fail" in get_args(
        get_type_hints(KVTransferConfig)["kv_load_failure_policy"]
    )


@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
def test_a_producer_does_not_defer_frees(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deferred frees keep a finished request's blocks for a step or more."""
    ours = connector_config()
    assert ours.kv_role == "kv_producer"
    other = dataclasses.replace(ours, kv_role=role)
    monkeypatch.setattr(connectors, "connector_config", lambda: other)
    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", 2)
    scheduler = make_host().scheduler
    assert scheduler.defer_block_free is (role == "kv_both")


def test_the_connector_is_found_by_its_module_path() -> None:
    config = connector_config()
    assert KVConnectorFactory.get_connector_class(config) is AslConnector
    assert KVConnectorFactory.supports_hma_config(config)


def test_kv_offloading_takes_the_connectors_name() -> None:
    """Why it is taken out of the arguments, and its connector put beside ours."""
    config = engine_config(kv_offloading_size=1)
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"


SIZED = {"cpu_bytes_to_use": 1 << 31}
OFFLOADING: dict[str, Any] = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": SIZED,
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_offloading_size": 2},
        {"kv_transfer_config": OFFLOADING},
        {"kv_transfer_config": KVTransferConfig(**OFFLOADING)},
        {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"connectors": [OFFLOADING]},
            }
        },
        {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "connectors": [
                        dataclasses.asdict(connector_config()),
                        OFFLOADING,
                    ]
                },
            }
        },
    ],
    ids=["size", "named", "config", "multi", "multi with ours"],
)
def test_offloading_is_put_beside_our_connector(arguments: dict[str, Any]) -> None:
    args = engine_args({"policy": "asl"}, **arguments)
    # As ``vllm serve`` does.
    for _ in range(2):
        config = args.create_engine_config()
        transfer = config.kv_transfer_config
        assert transfer is not None
        assert transfer.kv_role == "kv_producer"
        assert KVConnectorFactory.get_connector_class(transfer) is AslMultiConnector
        assert KVConnectorFactory.supports_hma_config(transfer)
        children = MultiConnector._get_connector_classes_and_configs(config)
        assert [child for child, _ in children] == [AslConnector, OffloadingConnector]
        other = children[1][1].kv_transfer_config
        assert other is not None
        assert (other.kv_role, other.kv_connector_extra_config) == ("kv_both", SIZED)
        assert other.engine_id == transfer.engine_id


def test_model_config_fields() -> None:
    config = engine_config().model_config
    assert isinstance(config, ModelConfig)
    assert config.runner_type == "generate"
    for name in (
        "is_encoder_decoder",
        "supports_multimodal_inputs",
        "use_mla",
        "is_hybrid",
        "is_attention_free",
        "has_inner_state",
    ):
        assert getattr(config, name) is False, name
    assert config.get_sliding_window() is None
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.hf_text_config.num_hidden_layers == 10
    assert config.get_hidden_size() == 128
    assert config.max_model_len == 256


def test_number_of_layers() -> None:
    config = engine_config()
    assert parameters(ModelConfig.get_num_layers)[:2] == ("self", "parallel_config")
    assert config.model_config.get_num_layers(config.parallel_config) == 10


def test_parallel_config_fields() -> None:
    config = engine_config().parallel_config
    assert isinstance(config, ParallelConfig)
    for name in (
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        assert getattr(config, name) == 1, name
    assert config.enable_expert_parallel is False
    assert config.use_ubatching is False
    assert config.local_engines_only is False
    assert config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_other_configuration_fields() -> None:
    config = engine_config(
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        }
    )
    assert isinstance(config.speculative_config, SpeculativeConfig)
    assert config.speculative_config.method == "ngram"
    assert config.num_speculative_tokens == 2
    assert config.lora_config is None
    assert config.scheduler_config.max_num_batched_tokens > 0
    assert config.scheduler_config.max_num_seqs > 0
    assert hasattr(config.compilation_config, "max_cudagraph_capture_size")
    assert config.cache_config.block_size > 0
    assert config.cache_config.num_gpu_blocks is None


def test_rust_front_end_switch() -> None:
    assert vllm.envs.VLLM_USE_RUST_FRONTEND is False
