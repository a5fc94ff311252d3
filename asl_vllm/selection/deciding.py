"""Asking a policy about a layer, and refusing what no cache may be made of."""

from __future__ import annotations

import torch
from torch import Tensor

from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.policies import Keep, LayerDecision, Policy


def decide(
    policy: Policy, layer: int, tokens: int, layer_score: Tensor, head_scores: Tensor
) -> LayerDecision:
    """A policy's decision about a layer of M ``tokens`` (see `Policy.decide`), checked.

    Synchronises with the host once; of a decision's tokens only the shape is checked.

    Raises:
        SelectionError: Scores are not finite, or scores or the decision do not fit the
            layer.
    """
    kv_heads = len(head_scores)
    scored = (tokens - policy.tail,)
    for name, scores, shape in (
        ("layer score", layer_score, scored),
        ("head scores", head_scores, (kv_heads, *scored)),
    ):
        if scores.shape != shape:
            raise _refusal(policy, layer, name, scores, f"float32 {list(shape)}")
    observed = policy.observe(layer, layer_score)
    number = _read(layer, layer_score, head_scores, observed)
    decision = policy.decide(layer, layer_score, head_scores, number)
    _check(policy, layer, decision, kv_heads, tokens)
    return decision


def _read(
    layer: int, layer_score: Tensor, head_scores: Tensor, observed: Tensor | None
) -> float | None:
    """Reads ``observed`` if the scores are finite: the layer's one host sync."""
    finite = layer_score.isfinite().all() & head_scores.isfinite().all()
    flag = finite.double()
    numbers = flag.reshape(1) if observed is None else torch.stack([flag, observed])
    is_finite, *rest = numbers.tolist()
    if not is_finite:
        raise SelectionError(
            f"layer {layer}: the attention scores are not finite; the model's "
            "queries or keys overflow, so no tokens can be selected."
        )
    return float(rest[0]) if rest else None


def _check(
    policy: Policy, layer: int, decision: LayerDecision, kv_heads: int, tokens: int
) -> None:
    """Refuses a decision that would leave slots of the cache unwritten or unread."""
    kept, deeper, k = decision.kept, decision.deeper, policy.kept_tokens
    fits = kept is Keep.NONE or _is_tokens(kept, (kv_heads, k))
    if not fits:
        raise _refusal(
            policy, layer, "kept", kept, f"int64 [{kv_heads}, {k}], or Keep.NONE"
        )
    count = deeper.shape[-1] if isinstance(deeper, Tensor) and deeper.ndim else 0
    fits = deeper is Keep.ALL or (k <= count <= tokens and _is_tokens(deeper, (count,)))
    if not fits:
        wanted = f"int64 [{k} to {tokens}], or Keep.ALL"
        raise _refusal(policy, layer, "deeper", deeper, wanted)


def _is_tokens(value: object, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype is torch.int64
    )


def _refusal(
    policy: Policy, layer: int, name: str, value: object, allowed: str
) -> SelectionError:
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
    return SelectionError(
        f"layer {layer}: the {name} of {type(policy).__name__}: got {got}; allowed: "
        f"{allowed}. Correct the policy."
    )
