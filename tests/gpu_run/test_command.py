"""The command itself, on this machine: ``python -m benchmarks.gpu --dry``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder
from benchmarks.gpu.child import run_stage
from benchmarks.gpu.expected import BLOCK, BUDGET, FILE, MODEL, QUESTIONS, RULE, load
from benchmarks.gpu.machine import slug
from benchmarks.gpu.prepare import ROOT, environment, write_metadata
from benchmarks.gpu.stage import Host
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.stages.engines import WAYS, near


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_dry_run_of_a_cheap_stage(tmp_path: Path) -> None:
    done = command("--dry", "--output", str(tmp_path), "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "sanitizer.json").read_text())
    (calls,) = result["rows"]
    assert calls == {"what": "without a tool", "status": 0, "ok": True}
    assert result["machine"]["versions"]["asl_vllm"]
    *_, head, first, _, folder = done.stdout.splitlines()
    assert head.split() == ["stage", "status", "s"]
    assert first.split()[:2] == ["sanitizer", "passed"]
    assert folder == str(tmp_path)


def test_what_needs_a_gpu_is_skipped_in_a_dry_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    stage = STAGES["engine-v2-triton-eager"]
    assert run_stage(stage, Host(dry=True, work=tmp_path), path) == "skipped"
    assert json.loads(path.read_text())["why"].startswith("needs a GPU")


def test_stages_are_listed_and_unknown_ones_refused() -> None:
    listed = command("--list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(STAGES)
    refused = command("nonsense")
    assert refused.returncode == 2
    assert "unknown: nonsense; allowed: rule," in refused.stderr


def test_the_plugin_is_found_where_nothing_is_installed(tmp_path: Path) -> None:
    folder = write_metadata(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    assert found.version == importlib.metadata.version("asl_vllm")
    want = importlib.metadata.entry_points(group="vllm.general_plugins")
    (ours,) = (point for point in want if point.name == "asl_vllm")
    (written,) = found.entry_points
    assert (written.group, written.value) == ("vllm.general_plugins", ours.value)


def test_a_bundle_is_unpacked_once_and_comes_first(tmp_path: Path) -> None:
    bundle, work = tmp_path / "bundle", tmp_path / "work"
    bundle.mkdir()
    (bundle / "unpack.py").write_text(
        "import os, pathlib\n"
        "package = pathlib.Path(os.environ['VLD']) / 'pretend'\n"
        "package.mkdir(parents=True)\n"
        "(package / '__init__.py').touch()\n"
    )
    for _ in range(2):  # a second mkdir would fail
        env = environment(work, bundle)
    assert env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    code = "import pretend, asl_vllm, asl_kernels; print(pretend.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(work))
    with pytest.raises(FileNotFoundError, match=r"has no unpack\.py"):
        environment(work, tmp_path)


def test_what_the_caller_sets_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    env = environment(tmp_path, None)
    assert env["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert env["PYTHONPATH"].endswith(os.pathsep + "elsewhere")
    assert "VLLM_USE_DEEP_GEMM" not in env or "VLLM_USE_DEEP_GEMM" in os.environ


def test_expected_answers_are_those_of_the_oracle() -> None:
    """The shortest prompt, computed anew; the file is of these prompts."""
    stored = load()
    assert len(stored) == len(QUESTIONS) == len(json.loads(FILE.read_text()))
    for want in stored:
        count = len(want.answer)
        assert want.plain[:count] == want.pruned[:count] == want.answer
        kept = resolve_kept(
            BUDGET,
            num_prompt_tokens=len(want.prompt),
            block_size=BLOCK,
            window=RULE["window"],
        )
        assert want.kept == kept
    shortest = min(stored, key=lambda want: len(want.prompt))
    got = generate(
        TinyDecoder.load(MODEL),
        shortest.prompt,
        kept=shortest.kept,
        max_tokens=len(shortest.pruned),
        **RULE,
    )
    assert got.tokens == shortest.pruned
    assert got.selection_layer == shortest.selection_layer


def test_bf16_alone_changes_neither_digits_nor_layers() -> None:
    """What engines on a GPU are held to is met by plain PyTorch in their dtype."""
    model = TinyDecoder.load(MODEL, torch.bfloat16)
    for want in sorted(load(), key=lambda want: len(want.prompt))[:3]:
        count = len(want.answer)
        got = generate(model, want.prompt, kept=want.kept, max_tokens=count, **RULE)
        assert got.tokens == want.answer
        assert got.selection_layer == want.selection_layer


def test_every_way_to_run_an_engine_is_there() -> None:
    seen = {(way.runner, way.backend) for way in WAYS}
    assert seen == {(r, b) for r in ("v1", "v2") for b in ("FLASH_ATTN", "TRITON_ATTN")}
    flash = {
        way.mode for way in WAYS if (way.runner, way.backend) == ("v2", "FLASH_ATTN")
    }
    assert flash == {"eager", "full graphs", "piecewise", "compiled", "default"}
    assert len({way.name for way in WAYS}) == len(WAYS)


def test_selection_layers_may_be_off_by_one() -> None:
    assert near(5, 6) and near(None, None) and near(4, 4)
    assert not near(5, 7) and not near(None, 5) and not near(5, None)


def test_a_folder_is_named_after_the_gpu() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
