"""The kernels as launches would have them compiled, for `ahead_of_time`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from asl_kernels.attention_at import triton as attending
from asl_kernels.gather_kept.triton import tile
from asl_kernels.window_scores.triton import tiles
from tests.triton.ahead_of_time import Variant

ATTENTION = "asl_kernels.attention_at.triton:attention_at_kernel"
VIEW = "asl_kernels.block_table_view.triton:view_kernel"
GATHER = "asl_kernels.gather_kept.triton:gather_kernel"
PAIR = "asl_kernels.gather_kept.triton:gather_pair_kernel"
PARTIAL = "asl_kernels.rank_variance.triton:partial_kernel"
FINAL = "asl_kernels.rank_variance.triton:final_kernel"
STATISTICS = "asl_kernels.window_scores.triton.statistics:statistics_kernel"
COMBINE = "asl_kernels.window_scores.triton.statistics:combine_kernel"
MASS = "asl_kernels.window_scores.triton.column_sums:mass_kernel"
AVERAGE = "asl_kernels.window_scores.triton.pooling:average_kernel"
REACH = "asl_kernels.window_scores.triton.pooling:reach_kernel"

BYTES = {"*i8": 1, "*i16": 2, "*i32": 4, "*i64": 8}
DTYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
}
PLACES = ("token", "head")
DIMS = (64, 80, 96, 128, 256)
ROWS = ((1, 1), (32, 1), (9, 7), (64, 16))
"""Windows and query heads a KV head: blocks of 16, 32, 64 and several of 128 rows."""


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


def pair(word: str, contiguous: bool, dim: int = 128) -> Variant:
    """Keys and values of one KV head."""
    pointers = types(word, "p_k", "p_v", "p_k_out", "p_v_out") | {"p_kept": "*i64"}
    strides = types("i32", "i_k_token", "i_k_head", "i_v_token", "i_v_head")
    strides |= types("i32", "i_k_column", "i_v_column", "i_kept_slot")
    sizes = types("i32", "i_kept", "i_heads", "i_k_columns", "i_v_columns")
    sizes |= types("i32", "i_kept_head")
    slots, columns = tile(dim, BYTES[word])
    ones = ("i_k_column", "i_v_column", "i_kept_slot") if contiguous else ()
    aligned = (*pointers, "i_k_columns", "i_v_columns", *strides) if contiguous else ()
    return Variant(
        PAIR,
        pointers | sizes | strides,
        {"SLOTS": slots, "COLUMNS": columns} | dict.fromkeys(ones, 1),
        aligned,
    )


def attention(dtype: str, group: int, dim: int, extras: bool) -> Variant:
    """``extras``: a window, a soft cap and sinks; else none of them."""
    blocks, options = attending.block_sizes(dim, dim, DTYPES[dtype])
    pointers = types(dtype, "p_q", "p_k", "p_v", "p_out")
    pointers |= types("*i64", "p_q_positions", "p_k_positions")
    strides = types(
        "i32", *(f"stride_{x}_{y}" for x in ["q", "k", "v", "out"] for y in PLACES)
    )
    fixed: dict[str, int | float | bool | None] = {**blocks, "GROUP": group}
    fixed |= {"DIM": dim, "VALUE_DIM": dim, "HAS_WINDOW": extras, "HAS_CAP": extras}
    if extras:
        pointers |= {"p_sinks": dtype}
    else:
        fixed["p_sinks"] = None
    return Variant(
        ATTENTION,
        pointers
        | strides
        | types("i32", "num_queries", "num_keys", "window")
        | types("fp32", "scale", "soft_cap"),
        fixed,
        # Positions may begin anywhere.
        (*(name for name in pointers if name != "p_q_positions"), *strides),
        **options,
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


def _products(
    kernel: str,
    dtype: str,
    window: int,
    group: int,
    dim: int,
    several: bool,
    outputs: dict[str, str],
    others: dict[str, str],
) -> Variant:
    """What the two kernels that multiply queries and keys have in common.

    ``several``: requests, or only one.
    """
    blocks, options = tiles.block_sizes(window, group, dim, DTYPES[dtype])
    pointers = types(dtype, "p_q", "p_k") | outputs
    strides = types("i32", "stride_q_token", "stride_q_head")
    strides |= types("i32", "stride_k_token", "stride_k_head")
    fixed: dict[str, int | float | bool | None] = {**blocks}
    fixed |= {"WINDOW": window, "GROUP": group, "DIM": dim}
    if several:
        pointers |= {"p_starts": "*i64"}
    else:
        fixed["p_starts"] = None
    sizes = types("i32", "num_tokens", "split_tokens", "num_heads")
    return Variant(
        kernel,
        pointers | strides | sizes | others | {"log2_scale": "fp32"},
        fixed,
        (*pointers, *strides),
        **options,
    )


def statistics(dtype: str, window: int, group: int, dim: int, several: bool) -> Variant:
    outputs = types("*fp32", "p_max", "p_sum")
    return _products(STATISTICS, dtype, window, group, dim, several, outputs, {})


def mass(dtype: str, window: int, group: int, dim: int, several: bool) -> Variant:
    outputs = types("*fp32", "p_offset", "p_shift", "p_mass")
    others = types("i32", "num_columns")
    return _products(MASS, dtype, window, group, dim, several, outputs, others)


def combine() -> Variant:
    pointers = types("*fp32", "p_max", "p_sum", "p_offset", "p_shift")
    sizes = types("i32", "num_splits", "num_rows") | {"log2_scale": "fp32"}
    blocks = {"BLOCK_SPLITS": tiles.COMBINE_SPLITS, "BLOCK_ROWS": tiles.COMBINE_ROWS}
    return Variant(COMBINE, pointers | sizes, blocks, (*pointers, "num_rows"))


def average(pool: int, parts: int, several: bool) -> Variant:
    pointers = types("*fp32", "p_mass", "p_scores", "p_layer")
    sizes = types("i32", "num_tokens", "num_heads", "num_columns")
    sizes |= types("i32", "stride_scores_head")
    constants: dict[str, int | float | bool | None] = {"POOL": pool, "PARTS": parts}
    constants |= {"WINDOW": 32, "BLOCK": tiles.AVERAGE_BLOCK}
    if several:
        pointers |= types("*i64", "p_starts")
    else:
        constants["p_starts"] = None
    return Variant(AVERAGE, pointers | sizes, constants, tuple(pointers))


def reach(tokens: int, several: bool) -> Variant:
    pointers = types("*fp32", "p_averages", "p_scores", "p_layer")
    sizes = types("i32", "num_tokens", "num_heads", "num_columns")
    sizes |= types("i32", "stride_scores_head")
    constants: dict[str, int | float | bool | None] = {"REACH": tokens}
    constants |= {"WINDOW": 32, "BLOCK": tiles.AVERAGE_BLOCK}
    if several:
        pointers |= types("*i64", "p_starts")
    else:
        constants["p_starts"] = None
    return Variant(REACH, pointers | sizes, constants, tuple(pointers))


def scoring(
    dtype: str, window: int, group: int, dim: int, several: bool
) -> Iterator[Variant]:
    """The kernels that multiply queries and keys."""
    yield statistics(dtype, window, group, dim, several)
    yield mass(dtype, window, group, dim, several)


# Of each kernel and each way in which its tiles are chosen.
FEW = (
    view(),
    *(gather(word) for word in ("*i16", "*i64")),
    pair("*i8", contiguous=True),
    pair("*i16", contiguous=True),
    pair("*i16", contiguous=False),
    partial(),
    final(),
    combine(),
    average(pool=7, parts=1, several=False),
    reach(48, several=False),
    statistics("*bf16", 32, 4, 128, several=False),
    mass("*bf16", 32, 4, 128, several=False),
    statistics("*fp16", 32, 4, 80, several=True),
    mass("*bf16", 32, 4, 128, several=True),
    statistics("*bf16", 64, 16, 256, several=False),
    statistics("*fp32", 32, 4, 128, several=False),
    mass("*fp32", 32, 4, 256, several=True),
    attention("*bf16", 4, 128, extras=True),
    attention("*bf16", 4, 256, extras=False),
    attention("*fp16", 4, 80, extras=True),
    attention("*fp32", 4, 256, extras=True),
)


def every() -> Iterator[Variant]:
    """Every head size and dtype with every block of rows."""
    yield view()
    for word, contiguous in itertools.product(BYTES, (True, False)):
        yield gather(word)
        for dim in DIMS:
            yield pair(word, contiguous, dim)
    yield partial()
    yield final()
    yield combine()
    for pool, parts, several in itertools.product((1, 7, 63), (1, 8), (True, False)):
        yield average(pool, parts, several)
    for tokens, several in itertools.product((2, 48, 64), (True, False)):
        yield reach(tokens, several)
    for dtype, dim, extras in itertools.product(DTYPES, DIMS, (False, True)):
        yield attention(dtype, 4, dim, extras)
    for dtype, dim in itertools.product(DTYPES, DIMS):
        if dtype == "*fp16" and dim != 128:  # as bf16
            continue
        for window, group in ROWS[:-1]:
            yield from scoring(dtype, window, group, dim, several=False)
        for several in (False, True):
            yield from scoring(dtype, *ROWS[-1], dim, several)
