"""Asking a policy about a layer, and refusing what no cache may be made of."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from asl_vllm.selection.errors import SelectionError
from asl_vllm.selection.policies import Keep, LayerDecision, Policy

Result = TypeVar("Result")
Reading = Generator[Tensor, list[float], Result]
"""Work that hands over numbers on the device, fp64 ``[n]``, and is given them on the
host."""


def read_together(readings: Iterable[Reading[Result]]) -> list[Result]:
    """Does the work of all, and has the host wait once for what they all need next."""
    works = list(readings)
    results: dict[int, Result] = {}
    given: dict[int, list[float]] = {}
    waiting = dict(enumerate(works))
    while waiting:
        wanted: dict[int, Tensor] = {}
        for index, work in waiting.items():
            try:
                numbers = given.get(index)
                wanted[index] = next(work) if numbers is None else work.send(numbers)
            except StopIteration as end:
                results[index] = end.value
        waiting = {index: works[index] for index in wanted}
        if wanted:
            read = iter(torch.cat(list(wanted.values())).tolist())
            given = {i: [next(read) for _ in part] for i, part in wanted.items()}
    return [results[index] for index in range(len(works))]


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

    def read(self) -> Reading[None]:
        """Looks at what was added: at most one host sync.

        Raises:
            SelectionError: Scores are not finite.
        """
        if self._flags:
            yield from self.read_with(None)

    def read_with(self, value: Tensor | None) -> Reading[float | None]:
        """Looks at what was added, and reads ``value``: one host sync."""
        extra = [] if value is None else [value.double()]
        numbers = yield torch.stack([*self._flags, *extra])
        layers = self._layers
        self._layers, self._flags = [], []
        for layer, is_finite in zip(layers, numbers, strict=False):
            if not is_finite:
                raise SelectionError(
                    f"layer {layer}: the attention scores are not finite; the model's "
                    "queries or keys overflow, so no tokens can be selected."
                )
        return None if value is None else float(numbers[-1])


def deciding(
    policy: Policy,
    layer: int,
    tokens: int,
    layer_score: Tensor,
    head_scores: Tensor,
    finite: FiniteCheck | None = None,
    *,
    named: int | None = None,
) -> Reading[LayerDecision]:
    """A policy's decision about a layer of M ``tokens`` (see `Policy.decide`), checked.

    Of a decision's tokens only the shape is checked, and that the newest ones that must
    go deeper do. ``named`` is the layer's number for messages, where the policy counts
    scored layers only.

    With ``finite`` it reads numbers only where the policy observes one or selects
    tokens. Elsewhere ``finite`` is left to be read; until then, what was decided may
    come of scores that are not finite. Without, it looks at each layer's.

    Raises:
        SelectionError: Scores are not finite, or scores or the decision do not fit the
            layer.
    """
    name_of = layer if named is None else named
    kv_heads = len(head_scores)
    scored = (tokens - policy.tail,)
    for name, scores, shape in (
        ("layer score", layer_score, scored),
        ("head scores", head_scores, (kv_heads, *scored)),
    ):
        if scores.shape != shape:
            raise _refusal(policy, name_of, name, scores, f"float32 {list(shape)}")
    check = FiniteCheck() if finite is None else finite
    check.add(name_of, layer_score, head_scores)
    observed = policy.observe(layer, layer_score)
    number = None
    if finite is None or observed is not None:
        number = yield from check.read_with(observed)
    decision = policy.decide(layer, layer_score, head_scores, number)
    _check(policy, name_of, decision, kv_heads, tokens)
    deeper = decision.deeper
    if isinstance(deeper, Tensor):
        if policy.newest <= policy.tail:
            yield from check.read()
        elif decision.restart:
            raise SelectionError(
                f"layer {name_of}: {type(policy).__name__} starts over with fewer "
                "tokens, which layers with a sliding window do not allow. Choose "
                "another policy."
            )
        else:
            # Ascending: so all behind it are there too.
            first = tokens - policy.newest
            fits = len(deeper) >= policy.newest
            if fits:
                found = yield from check.read_with(deeper[-policy.newest])
                fits = found == first
            if not fits:
                raise _refusal(
                    policy,
                    name_of,
                    "deeper",
                    deeper,
                    f"the last {policy.newest} tokens among them, which layers with a "
                    "sliding window see; use Policy.tokens_deeper",
                )
    return decision


def decide(
    policy: Policy,
    layer: int,
    tokens: int,
    layer_score: Tensor,
    head_scores: Tensor,
    finite: FiniteCheck | None = None,
) -> LayerDecision:
    """`deciding` of one prompt."""
    work = deciding(policy, layer, tokens, layer_score, head_scores, finite)
    (decision,) = read_together([work])
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
