"""The kernels for GPUs that are not there: they compile, and spill next to nothing."""

from __future__ import annotations

import re

import pytest

from tests.triton.ahead_of_time import ARCHITECTURES, Assembled, compile_variants
from tests.triton.variants import (
    ATTENTION,
    DTYPES,
    FEW,
    GATHER,
    MASS,
    PAIR,
    PARTIAL,
    STATISTICS,
)

PRODUCTS = (ATTENTION, MASS, STATISTICS)
"""Kernels that multiply queries and keys."""


@pytest.fixture(scope="module")
def assembled() -> list[Assembled]:
    return compile_variants(FEW)


def test_every_kernel_compiles(assembled: list[Assembled]) -> None:
    assert len(assembled) == len(FEW) * len(ARCHITECTURES)
    assert {entry.arch for entry in assembled} == set(ARCHITECTURES)


def test_registers_are_not_spilled(assembled: list[Assembled]) -> None:
    for entry in assembled:
        print(entry)
        # Some assemblers spill two registers of the widest attention.
        allowed = 8 if entry.kernel == ATTENTION else 0
        assert max(entry.spill_stores, entry.spill_loads) <= allowed, entry
        # Of 64 Ki: two programs of four warps on a multiprocessor, or three.
        products = entry.kernel in PRODUCTS
        assert entry.registers <= (255 if products else 168), entry
        # Two programs on an H100's multiprocessor.
        assert entry.shared <= 96 << 10, entry


def test_products_are_those_of_tensor_cores_but_for_fp32(
    assembled: list[Assembled],
) -> None:
    products = [
        (variant, entry)
        for variant, entry in zip(
            (variant for variant in FEW for _ in ARCHITECTURES), assembled, strict=True
        )
        if entry.kernel in PRODUCTS
    ]
    assert {variant.signature["p_q"] for variant, _ in products} == set(DTYPES)
    for variant, entry in products:
        tensor_cores = {80: "mma.sync", 90: "wgmma.mma_async"}[entry.arch]
        fp32 = variant.signature["p_q"] == "*fp32"
        # TF32 would round the operands.
        assert (tensor_cores in entry.ptx) != fp32, entry
        assert "tf32" not in entry.ptx
        # Keys are on their way to shared memory while others are multiplied.
        if entry.kernel != ATTENTION or not fp32:
            assert "cp.async" in entry.ptx, entry


def test_aligned_rows_are_copied_16_bytes_at_a_time(assembled: list[Assembled]) -> None:
    aligned = [entry for entry in assembled if entry.kernel in (GATHER, PAIR)]
    strided = [
        entry for entry in aligned if not re.search(r"v4\.b32|v2\.b64", entry.ptx)
    ]
    # One variant, the strided one, cannot be.
    assert len(strided) == len(ARCHITECTURES), [str(entry) for entry in strided]


def test_loads_of_eight_layers_are_under_way_together(
    assembled: list[Assembled],
) -> None:
    for entry in assembled:
        if entry.kernel == PARTIAL:
            # Four a thread and layer: an unrolled loop, and one for what is left.
            assert entry.ptx.count("ld.global") >= 8 * 4, entry
