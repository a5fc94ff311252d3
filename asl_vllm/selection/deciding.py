"""Asking a policy about a layer, and refusing what no cache may be made of."""

from __future__ import annotations

import torch
from torch import Tensor

from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.policies import Keep, LayerDecision, Policy


class FiniteCheck:
    """Whether a prompt's scores are finite, known to the host only where it must be.

    Looking makes the host wait for the device, so layers are looked at together.
    """

    def __init__(self) -> None:
        self._layers: list[int] = []
        self._flags: list[Tensor] = []

    def add(self, layer: int, *scores: Tensor) -> None:
        """Scores of a layer, to be looked at later. Never waits for the device."""
        flags = [tensor.isfinite().all() for tensor in scores]
        self._layers.append(layer)
        self._flags.append(torch.stack(flags).all().double())

    def read(self, value: Tensor | None = None) -> float | None:
        """Looks at what was added, and reads ``value``: at most one host sync.

        Raises:
            SelectionError: Scores are not finite.
        """
        if not self._flags and value is None:
            return None
        extra = [] if value is None else [value.double()]
        numbers = torch.stack([*self._flags, *extra]).tolist()
        layers = self._layers
        self._layers, self._flags = [], []
        for layer, is_finite in zip(layers, numbers, strict=False):
            if not is_finite:
                raise SelectionError(
                    f"layer {layer}: the attention scores are not finite; the model's "
                    "queries or keys overflow, so no tokens can be selected."
                )
        return None if value is None else float(numbers[-1])


def decide(
    policy: Policy,
    layer: int,
    tokens: int,
    layer_score: Tensor,
    head_scores: Tensor,
    finite: FiniteCheck | None = None,
) -> LayerDecision:
    """A policy's decision about a layer of M ``tokens`` (see `Policy.decide`), checked.

    Of a decision's tokens only the shape is checked.

    With ``finite`` it synchronises with the host only where the policy observes a
    number or selects tokens. Elsewhere ``finite`` is left to be read; until then, what
    was decided may come of scores that are not finite. Without, it reads each layer's.

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
    check = FiniteCheck() if finite is None else finite
    check.add(layer, layer_score, head_scores)
    observed = policy.observe(layer, layer_score)
    read_now = finite is None or observed is not None
    number = check.read(observed) if read_now else None
    decision = policy.decide(layer, layer_score, head_scores, number)
    _check(policy, layer, decision, kv_heads, tokens)
    if isinstance(decision.deeper, Tensor):
        check.read()
    return decision


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
