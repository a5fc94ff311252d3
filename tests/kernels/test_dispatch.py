"""Which implementation the wrappers choose: Triton on CUDA, the reference elsewhere."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from asl_kernels.attention_at import attention_at
from asl_kernels.block_table_view import block_table_view
from asl_kernels.gather_kept import gather_kept, gather_tokens
from asl_kernels.rank_variance import descending_ranks, rank_variance
from asl_kernels.window_scores import window_scores
from asl_vllm_testing.imports import MODULES, imports_of
from asl_vllm_testing.toy import job, run

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
IMPLEMENTATIONS = ("reference", "triton")
PACKAGES = (
    "attention_at",
    "block_table_view",
    "gather_kept",
    "rank_variance",
    "window_scores",
)
WITHOUT_RESULT = ("attention_at", "block_table_view")

Call = Callable[[torch.device], Any]


def zeros(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    # `empty` is what a fake CUDA tensor can be made with where there is no CUDA.
    made = torch.empty(shape, dtype=dtype, device=device)
    return made if device.type == "cuda" else made.zero_()


def call_attention_at(device: torch.device) -> None:
    q = zeros(device, 5, 2, 8, dtype=torch.float16)
    at = zeros(device, 5, dtype=torch.int64)
    attention_at(q, q, q, at, at, scale=0.5, out=zeros(device, 5, 2, 8, dtype=q.dtype))


def call_view(device: torch.device) -> None:
    table = zeros(device, 2, 3, dtype=torch.int32)
    lens = zeros(device, 2, dtype=torch.int32)
    out = zeros(device, 2, 3, dtype=torch.int32), zeros(device, 2, dtype=torch.int32)
    block_table_view(table, lens, 16, out_table=out[0], out_lens=out[1])


def call_gather_kept(device: torch.device) -> Any:
    k = zeros(device, 5, 2, 8, dtype=torch.float16)
    return gather_kept(k, k, zeros(device, 2, 3, dtype=torch.int64))


def call_gather_tokens(device: torch.device) -> Any:
    hidden = zeros(device, 5, 8, dtype=torch.float16)
    return gather_tokens(hidden, zeros(device, 3, dtype=torch.int64))


def call_variance(device: torch.device) -> Any:
    return rank_variance(zeros(device, 2, 9, dtype=torch.int64), 3)


def call_window_scores(device: torch.device) -> Any:
    q = zeros(device, 4, 2, 8, dtype=torch.float16)
    k = zeros(device, 9, 1, 8, dtype=torch.float16)
    return window_scores(q, k, scale=0.5, pool_kernel=3)


# What Triton's module calls it -> the call, its package, the reference's name of it.
CALLS: dict[str, tuple[Call, str, str]] = {
    "attention_at": (call_attention_at, "attention_at", "attention_at"),
    "block_table_view": (call_view, "block_table_view", "block_table_view"),
    "gather_kept": (call_gather_kept, "gather_kept", "gather_rows"),
    "gather_tokens": (call_gather_tokens, "gather_kept", "gather_tokens"),
    "rank_variance": (call_variance, "rank_variance", "rank_variance"),
    "window_scores": (call_window_scores, "window_scores", "window_scores"),
}


class Recorder:
    """Stands for a function; keeps its calls, and runs it if there is one."""

    def __init__(self, real: Callable[..., Any] | None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._real = real

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        return self._real(*args) if self._real is not None else "Triton's"


class Forbidden:
    """Stands for a module that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was used")


@pytest.mark.parametrize("name", CALLS)
def test_on_the_cpu_the_reference_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, package_name, function = CALLS[name]
    package = importlib.import_module(f"asl_kernels.{package_name}")
    recorder = Recorder(getattr(package.reference, function))
    monkeypatch.setattr(package.reference, function, recorder)
    monkeypatch.setattr(package, "triton", Forbidden(), raising=False)
    call(torch.device("cpu"))
    assert recorder.calls


@pytest.mark.parametrize("name", CALLS)
def test_on_cuda_triton_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, package_name, _ = CALLS[name]
    package = importlib.import_module(f"asl_kernels.{package_name}")
    recorder = Recorder(None)
    stand_in = SimpleNamespace(**{name: recorder})
    monkeypatch.setattr(package, "triton", stand_in, raising=False)
    monkeypatch.setattr(package, "reference", Forbidden())
    # Tensors without memory that say they are on a GPU, whether there is one or not.
    with FakeTensorMode():
        result = call(torch.device("cuda", 0))
    (arguments,) = recorder.calls
    tensors = [given for given in arguments if isinstance(given, Tensor)]
    assert tensors
    assert all(tensor.is_cuda for tensor in tensors)
    assert result == (None if name in WITHOUT_RESULT else "Triton's")


def test_ranks_are_sorted_by_torch_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("asl_kernels.rank_variance")
    recorder = Recorder(lambda scores: scores)
    monkeypatch.setattr(package.reference, "descending_ranks", recorder)
    monkeypatch.setattr(package, "triton", Forbidden(), raising=False)
    with FakeTensorMode():
        descending_ranks(torch.empty(9, device="cuda:0"))
    assert len(recorder.calls) == 1


def test_the_cpu_path_works_where_triton_is_missing() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(KERNELS)!r})
sys.modules["triton"] = None
import torch
from asl_kernels.attention_at import attention_at
from asl_kernels.block_table_view import block_table_view
from asl_kernels.gather_kept import gather_kept, gather_tokens
from asl_kernels.rank_variance import descending_ranks, rank_variance
from asl_kernels.window_scores import window_scores
k = torch.ones(9, 1, 8)
at = torch.arange(9)
attention_at(k, k, k, at, at, scale=0.5, out=k.clone(), window=3)
window_scores(k[:4], k, scale=0.5, pool_kernel=3)
kept = torch.zeros(1, 2, dtype=torch.int64)
gather_kept(k, k, kept)
gather_tokens(k[:, 0], kept[0])
rank_variance(descending_ranks(k[:, 0, 0])[None], 2)
table = torch.zeros(1, 2, dtype=torch.int32)
lens = table[:, 0].clone()
block_table_view(table, lens, 16, out_table=table.clone(), out_lens=lens.clone())
for package in {PACKAGES!r}:
    assert f"asl_kernels.{{package}}.triton" not in sys.modules, package
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prefill_reaches_the_references_through_the_wrappers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorders = []
    for package_name, function in (
        ("window_scores", "window_scores"),
        ("rank_variance", "descending_ranks"),
        ("rank_variance", "rank_variance"),
        ("gather_kept", "gather_rows"),
        ("gather_kept", "gather_tokens"),
    ):
        package = importlib.import_module(f"asl_kernels.{package_name}")
        recorders.append(Recorder(getattr(package.reference, function)))
        monkeypatch.setattr(package.reference, function, recorders[-1])
        monkeypatch.setattr(package, "triton", Forbidden(), raising=False)
    assert run(job(), tau=0.7).report.selection_layer is not None
    assert all(recorder.calls for recorder in recorders)


def test_nobody_but_the_wrappers_knows_the_implementations() -> None:
    wrappers = {f"asl_kernels.{package}" for package in PACKAGES}
    used = set()
    for name, path in MODULES.items():
        if not name.startswith("asl_kernels"):
            imported = set(imports_of(path.read_text(), name, path.stem == "__init__"))
            mine = {one for one in imported if one.startswith("asl_kernels.")}
            used |= mine & wrappers
            inside = {f"{one}.{part}" for one in wrappers for part in IMPLEMENTATIONS}
            assert not any(one.startswith(tuple(inside)) for one in mine), name
    assert used == wrappers
