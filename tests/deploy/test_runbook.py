"""The figures of docs/runbook.md, against the code that they describe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from asl_vllm.config import POLICY_NAMES
from asl_vllm.prefill import MOST_PACKED, ModelShape, PrefillBuffers
from asl_vllm_testing import scripts

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
README = (ROOT / "deploy" / "README.md").read_text()

sizing = scripts.load("sizing")


def test_the_command_prints_what_the_runbook_shows(capsys) -> None:
    (block,) = re.findall(r"^```\n\$ (.+?)\n(.+?)^```", RUNBOOK, re.M | re.S)
    program, path, *arguments = shlex.split(block[0])
    assert (program, path) == (".venv/bin/python", "scripts/sizing.py")
    sizing.main(arguments)
    assert capsys.readouterr().out == block[1]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_prefill_takes_what_is_worked_out(tensor_parallel) -> None:
    config = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 100,
    }
    shape = sizing.shape_of(config, tensor_parallel)
    assert shape == ModelShape(
        num_layers=3,
        hidden_size=48,
        num_heads=4 // tensor_parallel,
        num_kv_heads=2 // tensor_parallel,
        head_dim=12,
        value_dim=12,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    sized = sizing.Sizing(shape=shape, block_size=16, window=5, prefill_tokens=100)
    # 7 pages of 16 tokens, as ScratchPages has them, of one layer.
    pages = 7 * 16 * sized.kv_bytes_per_token // 3
    buffers = PrefillBuffers(shape, 100, 5, packed=MOST_PACKED)
    assert sized.prefill_bytes == buffers.device_bytes + pages


def test_the_pool_is_counted_in_whole_blocks() -> None:
    shape = sizing.shape_of(sizing.LLAMA_8B, 1)
    sized = sizing.Sizing(shape=shape, block_size=16, window=32, prefill_tokens=16)
    block = 16 * 131072
    assert sized.pool_tokens(10 * block + 1) == 9 * 16  # one is the null block
    assert sized.pool_tokens(0) == 0
    # 1000 + 24 tokens lie in 64 blocks, of which 60 are freed.
    assert sized.held_tokens(1000, 40, 24) == 4 * 16


def test_options_that_are_named_exist() -> None:
    from tests.deploy.metrics import VLLM

    known = "".join(
        path.read_text()
        for path in (
            ROOT / "asl_vllm/engine/frontend/cli.py",
            VLLM / "engine/arg_utils.py",
        )
    )
    options = set(re.findall(r"`(?:vllm serve MODEL )?(--[a-z-]+)", RUNBOOK))
    ours = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "scripts/sizing.py").read_text()))
    assert "--kv-policy" in options
    assert [o for o in options - ours if f'"{o}"' not in known] == []
    for name in re.findall(r"--kv-policy (\w+)", RUNBOOK):
        assert name in POLICY_NAMES


def test_the_readme_names_every_folder() -> None:
    folders = {path.name for path in (ROOT / "deploy").iterdir() if path.is_dir()}
    named = re.findall(r"^\| `([\w-]+)/", README, re.M)
    assert folders == set(named)
