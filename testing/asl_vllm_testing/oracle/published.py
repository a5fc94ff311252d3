"""FastKV, GemFilter and PyramidInfer as published, with what the budget changes.

Written from the papers and their authors' implementations, which each function names.
N prompt tokens, M tokens at a layer, H query heads, Hkv KV heads, D head size, W
window, k tokens kept per layer (window included). Unlike there, every layer's cache
holds exactly k tokens, and the last W (GemFilter: the last one) are always among them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from asl_vllm_testing.oracle.asl import (
    OracleResult,
    decode,
    full_prefill,
    head_scores,
    rerun_last,
    with_window,
)
from asl_vllm_testing.oracle.model import TinyDecoder


@torch.inference_mode()
def fastkv(
    model: TinyDecoder,
    prompt_ids: Sequence[int],
    *,
    kept: int,
    window: int,
    pool_kernel: int,
    tsp_layer: int,
    tsp_rate: float,
    max_tokens: int,
) -> OracleResult:
    """arXiv 2502.01068; github.com/dongwonjo/FastKV.

    SnapKV with its heads grouped, per layer; layer tsp_layer hands on int(N tsp_rate)
    tokens by the sum of these scores (here at least k). tsp_rate 0.2 there.
    """
    ids, num_prompt = torch.tensor(prompt_ids), len(prompt_ids)
    result, cache = OracleResult(), []
    hidden, positions = model.embed(ids), torch.arange(num_prompt)
    for index in range(model.config.num_layers):
        result.layer_tokens.append(len(positions))
        out = model.layer(index, hidden, positions)
        hidden, num_tokens = out.hidden, len(positions)
        score = head_scores(out.q[-window:], out.k, pool_kernel)
        keep = with_window(score, kept - window, num_tokens)  # all, if they are k
        result.kept_per_layer.append(positions[keep])
        cache.append(_entries(out.k, out.v, keep))
        tsp_length = max(kept, int(num_prompt * tsp_rate))
        if index == tsp_layer and num_tokens > tsp_length:
            chosen = with_window(score.sum(0), tsp_length - window, num_tokens)
            hidden, positions = hidden[chosen], positions[chosen]
            result.selection_layer, result.propagated = index, positions
    cache, hidden = rerun_last(model, cache, ids[-1:], num_prompt - 1)
    return decode(model, cache, hidden, num_prompt, max_tokens, result)


@torch.inference_mode()
def gemfilter(
    model: TinyDecoder,
    prompt_ids: Sequence[int],
    *,
    kept: int,
    filter_layer: int,
    max_tokens: int,
) -> OracleResult:
    """arXiv 2409.17422, algorithm 1; github.com/SalesforceAIResearch/GemFilter.

    The last query's dot products (no softmax), summed over heads, averaged over five
    neighbours; the chosen tokens are a new prompt at positions 0 to k - 1, and what is
    generated follows at k.
    """
    ids, num_prompt = torch.tensor(prompt_ids), len(prompt_ids)
    hidden, positions = model.embed(ids), torch.arange(num_prompt)
    for index in range(filter_layer + 1):
        out = model.layer(index, hidden, positions)
        hidden = out.hidden
    num_heads, num_kv_heads = out.q.shape[1], out.k.shape[1]
    keys = out.k.repeat_interleave(num_heads // num_kv_heads, 1)  # [N, H, D]
    products = torch.einsum("hd,mhd->hm", out.q[-1], keys).sum(0)
    pooled = F.avg_pool1d(products[None], 5, 1, padding=2)[0]
    pooled[-1] = math.inf
    chosen = pooled.topk(kept).indices.sort().values
    cache, hidden = full_prefill(model, ids[chosen])
    result = OracleResult(selection_layer=filter_layer, propagated=chosen)
    num_layers = model.config.num_layers
    result.kept_per_layer = [chosen.expand(num_kv_heads, -1)] * num_layers
    result.layer_tokens = [num_prompt] * (filter_layer + 1) + [kept] * num_layers
    return decode(model, cache, hidden, kept, max_tokens, result)


@torch.inference_mode()
def pyramidinfer(
    model: TinyDecoder,
    prompt_ids: Sequence[int],
    *,
    kept: int,
    window: int,
    decay_ratio: float,
    max_tokens: int,
) -> OracleResult:
    """arXiv 2405.12532; github.com/mutonix/pyramidinfer (prefill stage, cosine).

    Attention of the last rows, weighted 1 to 1.2, averaged over heads and rows; four
    sinks, the earliest where fewer have room. There a fifth of the prompt are such
    rows, here W; there a layer's cache holds its whole input and 64 tokens are the
    least that goes deeper, here k for both.
    """
    ids, num_prompt = torch.tensor(prompt_ids), len(prompt_ids)
    num_layers = model.config.num_layers
    result, cache = OracleResult(), []
    hidden, positions = model.embed(ids), torch.arange(num_prompt)
    for index in range(num_layers):
        result.layer_tokens.append(len(positions))
        out = model.layer(index, hidden, positions)
        hidden, num_tokens = out.hidden, len(positions)
        context = num_tokens - window
        attention = _attention(out.q[-window:], out.k).mean(0)[:, :context]
        weighted = attention * torch.linspace(1.0, 1.2, window)[:, None]
        score = weighted.mean(0)
        sinks = torch.arange(1, 1 + len(score[:4]))
        score[:4] = torch.finfo(score.dtype).max / sinks
        keep = with_window(score, kept - window, num_tokens)
        result.kept_per_layer.append(positions[keep].expand(out.k.shape[1], -1))
        cache.append((out.k[keep], out.v[keep]))
        cosine = (math.cos(math.pi * index / num_layers) + 1) / 2
        ratio = (1 - decay_ratio) * cosine + decay_ratio
        count = max(kept - window, int(context * ratio))
        if count < context:
            chosen = with_window(score, count, num_tokens)
            hidden, positions = hidden[chosen], positions[chosen]
            if result.selection_layer is None:
                result.selection_layer, result.propagated = index, positions
    cache, hidden = rerun_last(model, cache, ids[-1:], num_prompt - 1)
    return decode(model, cache, hidden, num_prompt, max_tokens, result)


def _attention(q_window: Tensor, k: Tensor) -> Tensor:
    """Causal attention [H, W, M] of the last W queries [W, H, D] over k [M, Hkv, D]."""
    window, num_heads, head_dim = q_window.shape
    num_tokens, num_kv_heads, _ = k.shape
    keys = k.repeat_interleave(num_heads // num_kv_heads, 1)
    score = torch.einsum("whd,mhd->hwm", q_window, keys) / math.sqrt(head_dim)
    seen = torch.ones(window, num_tokens).tril(num_tokens - window).bool()
    return score.masked_fill(~seen, -math.inf).softmax(-1)


def _entries(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows keep [Hkv, k] of k and v [M, Hkv, D], each head its own."""
    rows = keep.t()[..., None].expand(-1, -1, k.shape[-1])
    return k.gather(0, rows), v.gather(0, rows)
