"""Adaptive layer selection, written straight from its definition, and the run.

N prompt tokens, M tokens at a layer, H query heads, Hkv KV heads, D head size,
W window, k tokens kept per layer (window included).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from asl_vllm_testing.oracle.model import TinyDecoder, at_least_fp32

POLICIES = ("asl", "snapkv", "random")

Cache = list[tuple[Tensor, Tensor]]  # per layer k and v, each [entries, Hkv, D]


@dataclass
class OracleResult:
    """One prompt's answer and how its cache was pruned.

    Positions are the prompt's own. Without pruning kept_per_layer and ratios are
    empty, selection_layer and propagated None.
    """

    tokens: list[int] = field(default_factory=list)
    selection_layer: int | None = None
    ratios: list[float] = field(default_factory=list)  # one per layer checked
    kept_per_layer: list[Tensor] = field(default_factory=list)  # each [Hkv, k]
    propagated: Tensor | None = None  # [k], what the deeper layers saw
    layer_tokens: list[int] = field(default_factory=list)  # through each layer run
    logprobs: list[float] = field(default_factory=list)  # one per token


def head_scores(
    q_window: Tensor, k: Tensor, pool_kernel: int, reach: int = 1
) -> Tensor:
    """Scores [Hkv, M - W] of the tokens before the window, for each KV head.

    q_window: [W, H, D], the last W queries; k: [M, Hkv, D]. reach: of how many pooled
    scores, a token's own the last, it has the largest.
    """
    if pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel {pool_kernel} is not odd")
    window, num_heads, head_dim = q_window.shape
    num_tokens, num_kv_heads, _ = k.shape
    before = num_tokens - window
    queries, keys = at_least_fp32(q_window), at_least_fp32(k)
    keys = keys.repeat_interleave(num_heads // num_kv_heads, 1)  # [M, H, D]
    score = torch.einsum("whd,mhd->hwm", queries, keys) * head_dim**-0.5
    rows = before + torch.arange(window)
    later = torch.arange(num_tokens)[None] > rows[:, None]
    weight = score.masked_fill(later, float("-inf")).softmax(-1)  # [H, W, M]
    column = weight[..., :before].sum(1)  # [H, M - W]
    pooled = F.avg_pool1d(
        column[None], pool_kernel, 1, pool_kernel // 2, count_include_pad=True
    )[0]
    scores = pooled.unflatten(0, (num_kv_heads, -1)).sum(1)
    return F.pad(scores, (reach - 1, 0)).unfold(1, reach, 1).amax(2)


def descending(score: Tensor) -> Tensor:
    """Token indices by falling score along the last dimension; later wins a tie."""
    last = score.shape[-1] - 1
    return last - score.flip(-1).argsort(dim=-1, descending=True, stable=True)


def ranks(layer_score: Tensor) -> Tensor:
    """Rank of every token of [M - W], 1 for the highest score, in float64."""
    order = descending(layer_score)
    rank = torch.empty(len(order), dtype=torch.float64)
    rank[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return rank


def rank_variance(recent: Sequence[Tensor], num_top: int) -> float:
    """Variance over layers of the ranks [M - W], on the union of each one's top."""
    stacked = torch.stack(list(recent))  # [layers, M - W]
    union = (stacked <= num_top).any(0)
    return stacked[:, union].var(0, correction=0).mean().item()


class SelectionRule:
    """Sees the layers' scores in order and says at which one to select.

    A first variance of zero gives NaN ratios, which never select.
    """

    def __init__(self, num_top: int, l_min: int, l_obs: int, tau: float) -> None:
        self.num_top, self.l_min, self.l_obs, self.tau = num_top, l_min, l_obs, tau
        self.history: list[Tensor] = []
        self.first: float | None = None
        self.ratios: list[float] = []

    def observe(self, layer_score: Tensor) -> bool:
        """Take in the next layer's score [M - W]; True if its ratio is below tau."""
        self.history.append(ranks(layer_score))
        if len(self.history) - 1 < self.l_min:
            return False
        variance = rank_variance(self.history[-self.l_obs :], self.num_top)
        if self.first is None:
            self.first = variance
        self.ratios.append(variance / self.first if self.first else float("nan"))
        return self.ratios[-1] < self.tau


@torch.inference_mode()
def generate(
    model: TinyDecoder,
    prompt_ids: Sequence[int],
    *,
    kept: int | None,
    window: int,
    pool_kernel: int,
    l_min: int,
    l_obs: int,
    tau: float,
    max_tokens: int,
    selection_layer: int | None = None,
    policy: str = "asl",
    seed: int = 0,
    eos_id: int | None = None,
    full_bands: int | None = None,
    reach: int = 1,
    score_layers: int = 1,
) -> OracleResult:
    """Greedy tokens after a prompt whose cache keeps `kept` tokens a layer.

    kept None (or no smaller than the prompt): full attention. Policy "asl" selects
    by the rule, or at selection_layer if that is given; "snapkv" never selects;
    "random" selects at selection_layer and keeps random tokens in place of the best.
    With eos_id, generation stops after that token. With full_bands, the layers are in
    that many bands and no layer up to the end of the selection layer's band drops a
    token; without a selection none does. score_layers: of how many layers' scores, the
    selection layer's the last, a token has the largest there.
    """
    num_prompt = len(prompt_ids)
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is none of {POLICIES}")
    if policy == "random" and selection_layer is None:
        raise ValueError('policy "random" needs a selection_layer')
    if policy == "snapkv" and selection_layer is not None:
        raise ValueError('policy "snapkv" takes no selection_layer')
    result = OracleResult()
    ids = torch.tensor(prompt_ids)
    if kept is None or kept >= num_prompt:
        cache, hidden = full_prefill(model, ids)
    else:
        if not window < kept:
            raise ValueError(f"kept {kept} leaves nothing beside the window {window}")
        rule = SelectionRule(kept - window, l_min, l_obs, tau)
        cache = _pruned_prefill(
            model, ids, kept, window, pool_kernel, rule, selection_layer, policy,
            torch.Generator().manual_seed(seed), result, full_bands, reach,
            score_layers,
        )  # fmt: skip
        # The last prompt token is run again, as a decode step over the pruned cache.
        cache, hidden = rerun_last(model, cache, ids[-1:], num_prompt - 1)
    return decode(model, cache, hidden, num_prompt, max_tokens, result, eos_id)


def rerun_last(
    model: TinyDecoder, cache: Cache, last: Tensor, position: int
) -> tuple[Cache, Tensor]:
    """Runs the last prompt token [1] as a decode step over the cache without it."""
    cache = [(k[:-1], v[:-1]) for k, v in cache]
    return _decode_step(model, cache, last, position)


def decode(
    model: TinyDecoder,
    cache: Cache,
    hidden: Tensor,
    position: int,
    max_tokens: int,
    result: OracleResult,
    eos_id: int | None = None,
) -> OracleResult:
    """Adds greedy tokens to result; hidden [1, hidden] is the last prompt token's.

    position is the first new token's.
    """
    while True:
        logprobs = model.logits(hidden)[-1].log_softmax(-1)
        token = int(logprobs.argmax())
        result.tokens.append(token)
        result.logprobs.append(logprobs[token].item())
        if token == eos_id or len(result.tokens) == max_tokens:
            return result
        cache, hidden = _decode_step(model, cache, torch.tensor([token]), position)
        position += 1


def full_prefill(model: TinyDecoder, ids: Tensor) -> tuple[Cache, Tensor]:
    """Every layer's cache and the last token's final hidden state [1, hidden]."""
    hidden, positions = model.embed(ids), torch.arange(len(ids))
    cache = []
    for index in range(model.config.num_layers):
        out = model.layer(index, hidden, positions)
        hidden = out.hidden
        cache.append((out.k, out.v))
    return cache, hidden[-1:]


def _pruned_prefill(
    model: TinyDecoder,
    ids: Tensor,
    kept: int,
    window: int,
    pool_kernel: int,
    rule: SelectionRule,
    fixed_layer: int | None,
    policy: str,
    generator: torch.Generator,
    result: OracleResult,
    full_bands: int | None,
    reach: int,
    score_layers: int,
) -> Cache:
    """The pruned cache of all the prompt's tokens; fills in what was selected."""
    num_prompt, num_top = len(ids), kept - window
    hidden, positions = model.embed(ids), torch.arange(num_prompt)
    cache = []
    lately: deque[Tensor] = deque(maxlen=score_layers)
    for index in range(model.config.num_layers):
        result.layer_tokens.append(len(positions))
        out = model.layer(index, hidden, positions)
        hidden = out.hidden
        if full_bands is not None and len(positions) == num_prompt:
            if result.selection_layer is None:
                scores = head_scores(out.q[-window:], out.k, pool_kernel, reach).sum(0)
                lately.append(scores)
                if fixed_layer == index or (
                    rule.observe(scores) and fixed_layer is None
                ):
                    result.selection_layer = index
                    result.propagated = _lately_best(lately, num_top, num_prompt)
            result.kept_per_layer.append(positions.expand(out.k.shape[1], -1))
            cache.append((out.k, out.v))
            size = model.config.num_layers // full_bands
            if result.selection_layer is not None and index % size == size - 1:
                positions = result.propagated
                hidden = hidden[positions]
            continue
        if result.selection_layer is not None:  # only the selected tokens are here
            result.kept_per_layer.append(positions.expand(out.k.shape[1], -1))
            cache.append((out.k, out.v))
            continue
        per_head = head_scores(out.q[-window:], out.k, pool_kernel, reach)
        layer_score = per_head.sum(0)
        triggered = rule.observe(layer_score)
        if policy == "random":
            per_head = torch.rand(per_head.shape, generator=generator)
            layer_score = torch.rand(layer_score.shape, generator=generator)
        lately.append(layer_score)
        keep = with_window(per_head, num_top, num_prompt)  # [Hkv, k]
        result.kept_per_layer.append(keep)
        entries = keep.t()[..., None].expand(-1, -1, out.k.shape[-1])  # [k, Hkv, D]
        cache.append((out.k.gather(0, entries), out.v.gather(0, entries)))
        if fixed_layer is not None:
            triggered = index == fixed_layer
        if triggered and policy != "snapkv":
            result.selection_layer = index
            positions = _lately_best(lately, num_top, num_prompt)  # [k]
            result.propagated = positions
            hidden = hidden[positions]
    result.ratios = rule.ratios
    return cache


def _lately_best(lately: Sequence[Tensor], num_top: int, num_tokens: int) -> Tensor:
    """Top tokens [k] by the largest of some layers' scores, and the window."""
    return with_window(torch.stack(list(lately)).amax(0), num_top, num_tokens)


def with_window(score: Tensor, num_top: int, num_tokens: int) -> Tensor:
    """Top tokens of score [..., M - W] and the window, in order: [..., k]."""
    top = descending(score)[..., :num_top].sort(-1).values
    rest = torch.arange(score.shape[-1], num_tokens).expand(*top.shape[:-1], -1)
    return torch.cat([top, rest], -1)


def _decode_step(
    model: TinyDecoder, cache: Cache, token: Tensor, position: int
) -> tuple[Cache, Tensor]:
    """Run one token [1] over the cache; the grown cache and its state [1, hidden]."""
    hidden, positions = model.embed(token), torch.tensor([position])
    grown = []
    for index, (k, v) in enumerate(cache):
        out = model.layer(index, hidden, positions, past=(k, v))
        hidden = out.hidden
        grown.append((torch.cat([k, out.k]), torch.cat([v, out.v])))
    return grown, hidden
