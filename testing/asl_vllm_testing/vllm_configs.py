"""Engine configurations from models that are a config.json and a tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm.envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from asl_vllm import plugin
from asl_vllm.engine.frontend import served
from asl_vllm_testing import TINY_MODEL

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 240,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
COHERE2: dict[str, Any] = {
    **LLAMA_SIZES,
    "architectures": ["Cohere2ForCausalLM"],
    "model_type": "cohere2",
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.fixture(autouse=True)
def quick_and_clean_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """vLLM as a fresh process has it, less what is slow.

    vLLM looks at a model class in a process of its own, once for each; here that
    would be seconds a model, so it looks in this one. Its platform code sets
    environment variables, and an engine that ran before makes it remember theirs.
    """
    plugin.register()
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    monkeypatch.setattr(served, "_served", None)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm_cache"))
    vllm.envs.disable_envs_cache()
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def model_dir(folder: Path, **config: Any) -> str:
    """Writes a model folder that vLLM takes for a model of this config."""
    folder.mkdir()
    for path in TINY_MODEL.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def engine_args(
    policy: dict[str, Any] | None = None, *, model: str | Path = TINY_MODEL, **kw: Any
) -> EngineArgs:
    """Arguments of a small CPU engine, with ``policy`` as asl_vllm's options."""
    if policy is not None:
        kw["additional_config"] = {"asl_vllm": policy}
    defaults = {"dtype": "float32", "max_model_len": 256}
    return EngineArgs(model=str(model), **{**defaults, **kw})


def engine_config(policy: dict[str, Any] | None = None, **kw: Any) -> VllmConfig:
    """What vLLM makes of `engine_args`."""
    return engine_args(policy, **kw).create_engine_config()
