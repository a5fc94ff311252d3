"""The Dockerfile and the compose file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import asl_vllm

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE_FILE = ROOT / "deploy" / "compose" / "compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
TOOLS = Path(sys.executable).parent
BUILD = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs a program that a package of the dev extra installs."""
    if not (TOOLS / name).exists():
        pytest.skip(f"{name} has no build for this machine")
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)


# --- Dockerfile ---


def test_hadolint_has_no_complaint() -> None:
    ran = tool("hadolint", "--failure-threshold", "style", ROOT / "Dockerfile")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_hadolint_would_complain(tmp_path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    ran = tool("hadolint", tmp_path / "Dockerfile")
    assert ran.returncode == 1
    assert "DL3006" in ran.stdout


def stages() -> list[str]:
    """The text of each stage, from its FROM."""
    return re.split(r"^(?=FROM )", DOCKERFILE, flags=re.M)[1:]


def test_the_image_is_vllms_with_the_version_that_the_patches_are_for() -> None:
    last = stages()[-1]
    version = re.match(r"FROM vllm/vllm-openai:v(0\.\d+\.\d+)\n", last)
    assert version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["gpu"]
    assert Requirement(wanted).specifier.contains(version[1])


def test_the_image_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", stages()[-1], re.M)
    assert users
    assert int(users[-1]) > 0
    # Nothing is made by root after that, and the caches are the user's.
    after = stages()[-1].partition("\nUSER ")[2]
    assert "RUN" not in after
    assert f"chown -R {users[-1]}:0 /cache" in stages()[-1]


def test_caches_lie_in_the_volume() -> None:
    assert 'VOLUME ["/cache"]' in DOCKERFILE
    places = re.findall(r"\b([A-Z_]*(?:HOME|DIR|ROOT))=(\S+)", stages()[-1])
    assert {"HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"} <= {n for n, _ in places}
    assert all(place.startswith("/cache") for _, place in places)
    # Folders below the mount may be hidden by it, so nothing may have to exist there.
    assert dict(places)["HOME"] == "/cache"
    assert re.findall(r"^WORKDIR (\S+)$", stages()[-1], re.M) == ["/cache"]


def test_the_health_check_tells_the_dead_from_the_living(tmp_path) -> None:
    """Its command is run against answers of status 200 and 503."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (text,) = re.findall(r"HEALTHCHECK (?:.|\\\n)*?CMD (\[.*\])$", DOCKERFILE, re.M)
    command = [sys.executable, *json.loads(text)[1:]]
    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for path, status in (("health", 0), ("dead", 1)):
            url = f"http://127.0.0.1:{server.server_port}/{path}"
            ran = subprocess.run(command, env={"HEALTH_URL": url}, capture_output=True)
            assert ran.returncode == status
    finally:
        server.shutdown()
        server.server_close()


def copied() -> list[str]:
    """What the first stage copies, in the order given."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", stages()[0], re.M)
    return [name for line in lines for name in line.split()[:-1]]


def test_the_build_context_has_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == set(copied())


def test_a_whole_wheel_is_built_from_what_is_copied(tmp_path) -> None:
    context = tmp_path / "src"
    context.mkdir()
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, context / name, ignore=ignore)
        else:
            shutil.copy(source, context / name)
    # What pip calls, without pip: its own set-up takes seconds.
    subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path],
        cwd=context,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"asl_vllm-{asl_vllm.__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("asl_vllm", "kernels/asl_kernels", "server/asl_server"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to((ROOT / folder).parent).as_posix()
                assert name in inside
    assert any(name.endswith("entry_points.txt") for name in inside)
    packages = {name.partition("/")[0] for name in inside if ".dist-info/" not in name}
    assert packages == {"asl_vllm", "asl_kernels", "asl_server"}


# --- Compose ---


def test_the_compose_specification_accepts_it() -> None:
    ran = tool(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE_FILE
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_compose_specification_would_refuse(tmp_path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE_FILE.read_text().replace("shm_size:", "shm-size:"))
    ran = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong)
    assert ran.returncode == 1
    assert "shm-size" in ran.stdout


def test_variables_without_a_default_are_in_the_example() -> None:
    lines = (COMPOSE_FILE.parent / "example.env").read_text().splitlines()
    named = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    used = set(re.findall(r"\$\{(\w+)", COMPOSE_FILE.read_text()))
    assert used == named


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_confined_and_pinned(name) -> None:
    service = COMPOSE["services"][name]
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_files_that_are_mounted_exist() -> None:
    mounts = [
        volume
        for service in COMPOSE["services"].values()
        for volume in service["volumes"]
    ]
    for mount in mounts:
        if mount["type"] == "bind":
            assert (COMPOSE_FILE.parent / mount["source"]).is_dir()
            assert mount["read_only"]
        else:
            assert mount["source"] in COMPOSE["volumes"]


def test_versions_agree() -> None:
    image = COMPOSE["services"]["vllm"]["image"]
    assert image == f"asl-vllm:{asl_vllm.__version__}"
    grafana = COMPOSE["services"]["grafana"]["image"].rpartition(":")[2]
    project = (ROOT / "pyproject.toml").read_text()
    (sdk,) = re.findall(r'"grafana-foundation-sdk==\d+!([\d.]+)"', project)
    assert grafana.split(".")[:2] == sdk.split(".")[:2]


def test_prometheus_scrapes_the_server() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert COMPOSE["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"EXPOSE {port}" in DOCKERFILE
