"""The wheel as users have it: installed, in another folder, beside another's policy."""

from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from asl_vllm_testing.server import Server

PROMPT = [4 + i % 200 for i in range(500)]


def test_the_distributions_have_code_and_no_model(
    built_wheel: tuple[Path, Path],
) -> None:
    sdist, made = built_wheel
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        assert sum(member.file_size for member in archive.infolist()) < 2_000_000
    tops = {name.partition("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        *("asl_vllm", "asl_kernels", "asl_server")
    }
    assert "asl_server/pages/index.html" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())


def test_the_checkout_is_not_seen(wheel_python: Path, tmp_path: Path) -> None:
    code = "import asl_vllm, asl_kernels, asl_server as s; print(asl_vllm.__file__)"
    env = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH"}}
    ran = subprocess.run(
        [str(wheel_python), "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(wheel_python.parents[1]))


def test_anothers_policy_is_offered_and_runs(wheel_server: Server) -> None:
    """That of docs/policies.md, found by its entry point."""
    offered = wheel_server.http.get("/v1/kv/policies").json()
    assert offered["policies"][-1] == "newest"
    model = wheel_server.http.get("/v1/models").json()["data"][0]["id"]

    def ask(policy: str) -> dict[str, Any]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 4}
        body |= {"kv_budget": 96, "kv_policy": policy}
        reply = wheel_server.http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()["kv_transfer_params"]
        return told

    theirs, ours = ask("newest"), ask("snapkv")
    assert (theirs["policy"], theirs["selection_layer"]) == ("newest", 1)
    assert theirs["kept_tokens"] == 84  # of 500, without 13 blocks of 32
    assert (ours["policy"], ours["selection_layer"]) == ("snapkv", None)
