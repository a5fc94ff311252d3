"""A real Prometheus, with deploy/'s configuration, scrapes a real server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from asl_vllm_testing import ROOT, scripts
from asl_vllm_testing.server import Server

FOLDER = ROOT / "deploy" / "prometheus"


def test_prometheus_scrapes_and_evaluates_the_rules(
    wheel_server: Server, tmp_path: Path
) -> None:
    finder = scripts.load("prometheus")
    try:
        program = finder.find_or_fetch("prometheus")
    except finder.NoPrometheusError as error:
        pytest.skip(str(error))
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [wheel_server.url.removeprefix("http://")]}]
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [str(program), f"--config.file={tmp_path}/prometheus.yml"]
    command += [
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        # Its port is open before its data can be asked for: 503 until then.
        _until(lambda: _get(address, "-/ready").is_success, seconds=30)
        prompt = "the sky is blue . " * 40
        body = {"model": "small", "prompt": prompt, "max_tokens": 1, "kv_budget": 64}
        wheel_server.http.post("/v1/completions", json=body).raise_for_status()
        asked = "sum(vllm:asl_requests_total) > 0"
        _until(lambda: _query(address, f"query?query={asked}")["result"], seconds=30)
        (group,) = _until(
            lambda: [
                group
                for group in _query(address, "rules")["groups"]
                if all(rule["health"] == "ok" for rule in group["rules"])
            ],
            seconds=30,
        )
        assert len(group["rules"]) == len(
            yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
        )
    finally:
        process.terminate()
        process.wait(timeout=20)


def _get(address: str, path: str) -> httpx.Response:
    return httpx.get(f"http://{address}/{path}", trust_env=False)


def _query(address: str, path: str) -> Any:
    reply = _get(address, f"api/v1/{path}")
    reply.raise_for_status()
    return reply.json()["data"]


def _until(read: Any, seconds: float) -> Any:
    """The first value that is not empty."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = read()
        except httpx.TransportError:
            value = None
        if value:
            return value
        assert time.monotonic() < deadline, "Prometheus had no answer in time"
        time.sleep(0.5)
