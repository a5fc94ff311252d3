"""The kernels for GPUs that are not there: they compile, and spill no registers."""

from __future__ import annotations

import re

import pytest

from asl_kernels.gather_kept.triton import tile
from tests.triton.ahead_of_time import (
    ARCHITECTURES,
    Assembled,
    Variant,
    compile_variants,
)

VIEW = "asl_kernels.block_table_view.triton:view_kernel"
GATHER = "asl_kernels.gather_kept.triton:gather_kernel"
PAIR = "asl_kernels.gather_kept.triton:gather_pair_kernel"
PARTIAL = "asl_kernels.rank_variance.triton:partial_kernel"
FINAL = "asl_kernels.rank_variance.triton:final_kernel"
BYTES = {"*i8": 1, "*i16": 2, "*i32": 4, "*i64": 8}


def types(of: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, of)


def view() -> Variant:
    pointers = types("*i32", "p_table", "p_lens", "p_out_table", "p_out_lens")
    sizes = types("i32", "i_columns", "i_block_size", "i_table_row", "i_out_row")
    strides = ("i_table_column", "i_lens_row", "i_out_column", "i_out_lens_row")
    return Variant(
        VIEW,
        pointers | sizes,
        {"BLOCK": 1024} | dict.fromkeys(strides, 1),
        tuple(pointers),
    )


def gather(word: str) -> Variant:
    """Hidden states of 4096 elements."""
    pointers = {"p_source": word, "p_kept": "*i64", "p_out": word}
    sizes = types("i32", "i_kept", "i_columns", "i_source_token")
    sizes |= types("i32", "i_source_head", "i_kept_head")
    slots, columns = tile(4096, BYTES[word])
    constants = {"i_heads": 1, "i_source_column": 1, "i_kept_slot": 1}
    return Variant(
        GATHER,
        pointers | sizes,
        constants | {"SLOTS": slots, "COLUMNS": columns},
        (*pointers, "i_columns", "i_source_token", "i_source_head"),
    )


def pair(word: str, contiguous: bool) -> Variant:
    """Heads of 128 elements."""
    pointers = types(word, "p_k", "p_v", "p_k_out", "p_v_out") | {"p_kept": "*i64"}
    strides = types("i32", "i_k_token", "i_k_head", "i_v_token", "i_v_head")
    strides |= types("i32", "i_k_column", "i_v_column", "i_kept_slot")
    sizes = types("i32", "i_kept", "i_heads", "i_k_columns", "i_v_columns")
    sizes |= types("i32", "i_kept_head")
    slots, columns = tile(128, BYTES[word])
    ones = ("i_k_column", "i_v_column", "i_kept_slot") if contiguous else ()
    aligned = (*pointers, "i_k_columns", "i_v_columns", *strides) if contiguous else ()
    return Variant(
        PAIR,
        pointers | sizes | strides,
        {"SLOTS": slots, "COLUMNS": columns} | dict.fromkeys(ones, 1),
        aligned,
    )


def partial() -> Variant:
    pointers = {"p_ranks": "*i64", "p_partial": "*fp64"}
    sizes = types("i32", "i_layers", "i_tokens", "i_top", "i_rank_layer")
    constants = {"i_rank_token": 1, "BLOCK": 512}
    return Variant(PARTIAL, pointers | sizes, constants, tuple(pointers))


def final() -> Variant:
    pointers = types("*fp64", "p_partial", "p_variance")
    sizes = types("i32", "i_blocks", "i_layers")
    return Variant(FINAL, pointers | sizes, {"BLOCK": 1024}, tuple(pointers))


VARIANTS = (
    view(),
    *(gather(word) for word in ("*i16", "*i64")),
    pair("*i8", contiguous=True),
    pair("*i16", contiguous=True),
    pair("*i16", contiguous=False),
    partial(),
    final(),
)


@pytest.fixture(scope="module")
def assembled() -> list[Assembled]:
    return compile_variants(VARIANTS)


def test_every_kernel_compiles(assembled: list[Assembled]) -> None:
    assert len(assembled) == len(VARIANTS) * len(ARCHITECTURES)
    assert {entry.arch for entry in assembled} == set(ARCHITECTURES)


def test_no_register_is_spilled(assembled: list[Assembled]) -> None:
    for entry in assembled:
        print(entry)
        assert entry.spill_stores == entry.spill_loads == 0, entry
        # At more, fewer than 16 warps fit on a multiprocessor.
        assert entry.registers <= 128, entry


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
