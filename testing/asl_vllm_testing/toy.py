"""A toy decoder whose rounding does not depend on how a prompt is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asl_vllm.config import AslConfig
from asl_vllm.prefill import (
    Known,
    LayerTap,
    ModelShape,
    Prefill,
    PrefillBuffers,
    PrefillFactory,
    PrefillJob,
    PrefillReport,
    Verdict,
)
from asl_vllm.selection.policies import LayerDecision, Policy, make_policy

SHAPE = ModelShape(
    num_layers=5,
    hidden_size=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    value_dim=3,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
VOCABULARY = 50
WINDOW = 4
CAPACITY = 100


@dataclass
class Call:
    """One `run_layer`: the rows and the positions it was given."""

    layer: int
    start: int
    positions: list[int]
    keys_only: bool


@dataclass
class ToyDecoder:
    """Implements `DecoderModel` with random weights.

    Remembers the keys, values and queries of every layer and what was written to
    the pool. ``padding`` rows follow each chunk that the tap is shown, as vLLM's
    padded batches have them.
    """

    shape: ModelShape = SHAPE
    padding: int = 0
    calls: list[Call] = field(default_factory=list)
    embedded: list[int] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    written: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    """What was brought to each exchange."""
    other_rank: list[bytes] | None = None
    """What another rank brings to each; None: there is none."""
    pool: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of each layer that `load_prefix` reads; a block is a row."""
    loads: list[int] = field(default_factory=list)
    """Prefixes of each `load_prefixes`."""
    reruns: list[int] = field(default_factory=list)
    """Tokens of each `run_at`."""
    poison: set[int] = field(default_factory=set)
    """Layers of which the tap is shown one chunk of NaN keys, once."""

    def __post_init__(self) -> None:
        s = self.shape
        random = torch.Generator().manual_seed(0)

        def weights(rows: int, columns: int) -> list[Tensor]:
            return [
                torch.randn(rows, columns, generator=random) / columns**0.5
                for _ in range(s.num_layers)
            ]

        self.embedding = torch.randn(VOCABULARY, s.hidden_size, generator=random)
        self.w_q = weights(s.num_heads * s.head_dim, s.hidden_size)
        self.w_k = weights(s.num_kv_heads * s.head_dim, s.hidden_size)
        self.w_v = weights(s.num_kv_heads * s.value_dim, s.hidden_size)
        self.w_o = weights(s.hidden_size, s.num_heads * s.value_dim)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        assert len(positions) == len(token_ids)
        self.embedded.append(len(token_ids))
        return self.embedding[token_ids]

    def run_layer(
        self,
        layer: int,
        positions: Tensor,
        hidden: Tensor,
        start: int,
        tap: LayerTap,
        lengths: Sequence[int] = (),
        loaded: Sequence[int] = (),
    ) -> None:
        assert len(positions) == len(hidden)
        assert not lengths or (sum(lengths), start) == (len(hidden), 0)
        self.calls.append(Call(layer, start, positions.tolist(), tap.keys_only))
        turn = 1 + 0.01 * positions[:, None, None]
        q = turn * self._project(self.w_q[layer], hidden, self.shape.num_heads)
        k = turn * self._project(self.w_k[layer], hidden, self.shape.num_kv_heads)
        v = self._project(self.w_v[layer], hidden, self.shape.num_kv_heads)
        for history, rows in ((self.queries, q), (self.keys, k), (self.values, v)):
            before = history[layer] if start else rows[:0]
            assert len(before) == start
            history[layer] = torch.cat([before, rows])
        rows = start + torch.arange(len(q))
        window = self.shape.windows[layer] if self.shape.windows else None
        keys, values = self.keys[layer], self.values[layer]
        if lengths:
            heads = self._attend_apart(layer, (q, keys, values), lengths, loaded)
        elif window and tap.has_gaps:
            tap.on_query(q)
            tap.on_kv(k, v)
            heads = q.new_empty(*q.shape[:2], v.shape[2])
            tap.attend_window(q, heads, window, self.attention_scale(layer))
        else:
            heads = self._attend(layer, q, rows, keys, values, window)
        hidden += (heads.flatten(1)[:, None] * self.w_o[layer]).sum(-1)

        def padded(rows: Tensor) -> Tensor:
            return torch.cat([rows, torch.full((self.padding, *rows.shape[1:]), 99.0)])

        if layer in self.poison:
            self.poison.remove(layer)
            k = torch.full_like(k, float("nan"))
        tap.on_query(padded(q))
        tap.on_kv(padded(k), padded(v))
        if tap.keys_only:
            hidden.fill_(float("nan"))  # it may be anything then

    # Products are summed elementwise and over a fixed width: a matrix product may
    # round otherwise for another number of rows.

    def _project(self, weights: Tensor, hidden: Tensor, heads: int) -> Tensor:
        return (hidden[:, None] * weights).sum(-1).unflatten(-1, (heads, -1))

    def _attend(
        self,
        layer: int,
        q: Tensor,
        last: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Each query sees the rows up to its ``last``, ``window`` of them."""

        def all_rows(rows: Tensor) -> Tensor:
            group = self.shape.num_heads // rows.shape[1]
            full = rows.new_zeros(CAPACITY, *rows.shape[1:])
            full[: len(rows)] = rows
            return full.repeat_interleave(group, dim=1).transpose(0, 1)

        logits = (q[:, :, None] * all_rows(keys)).sum(-1)
        logits *= self.attention_scale(layer)
        rows = torch.arange(CAPACITY)
        seen = rows <= last[:, None]
        if window:
            seen &= rows > last[:, None] - window
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        return (weights[..., None] * all_rows(values)).sum(2)

    def _attend_apart(
        self,
        layer: int,
        rows: tuple[Tensor, Tensor, Tensor],
        lengths: Sequence[int],
        loaded: Sequence[int],
    ) -> Tensor:
        """Of several sequences, each behind the rows that were loaded of it."""
        none = Known(rows[1][:0], rows[2][:0])
        known = self._known if loaded else [none] * len(lengths)
        assert [len(own.keys) for own in known] == (list(loaded) or [0] * len(lengths))
        parts = [torch.split(part, list(lengths)) for part in rows]
        heads = []
        for own, q, key, value in zip(known, *parts, strict=True):
            last = len(own.keys) + torch.arange(len(q))
            keys = torch.cat([own.keys, key])
            values = torch.cat([own.values, value])
            heads.append(self._attend(layer, q, last, keys, values))
        return torch.cat(heads)

    def load_prefixes(
        self,
        layer: int,
        block_ids: Tensor,
        into: Sequence[Known],
        lengths: Sequence[int] = (),
    ) -> None:
        self.loads.append(len(into))
        rows = [len(own.keys) for own in into]
        pool_keys, pool_values = self.pool[layer]
        parts = zip(into, block_ids.split(rows), strict=True)
        for own, blocks in parts:
            own.keys.copy_(pool_keys[blocks])
            own.values.copy_(pool_values[blocks])
        # Attention's own copy: the caller may overwrite his.
        self._known = [Known(own.keys.clone(), own.values.clone()) for own in into]
        if not lengths:
            (first, *_) = self._known
            self.keys[layer], self.values[layer] = first.keys, first.values
            shape = len(first.keys), *self._query_dims
            self.queries[layer] = first.keys.new_zeros(shape)

    @property
    def _query_dims(self) -> tuple[int, int]:
        return self.shape.num_heads, self.shape.head_dim

    def run_at(
        self,
        layer: int,
        positions: Tensor,
        hidden: Tensor,
        known: Sequence[Known],
        lengths: Sequence[int],
    ) -> None:
        self.reruns.append(len(hidden))
        turn = 1 + 0.01 * positions[:, None, None]
        q = turn * self._project(self.w_q[layer], hidden, self.shape.num_heads)
        heads = []
        at = positions.split(list(lengths)), q.split(list(lengths))
        for own, last, rows in zip(known, *at, strict=True):
            assert bool((last[1:] > last[:-1]).all())
            heads.append(self._attend(layer, rows, last, own.keys, own.values))
        hidden += (torch.cat(heads).flatten(1)[:, None] * self.w_o[layer]).sum(-1)

    def write_kept(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor
    ) -> None:
        assert len(keys) == len(values) == len(slots)
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            place = (layer, slot)
            assert place not in self.written, f"{place} written twice"
            self.written[place] = (key.clone(), value.clone())

    def attention_scale(self, layer: int) -> float:
        return self.shape.head_dim**-0.5

    @property
    def num_ranks(self) -> int:
        return 1 if self.other_rank is None else 2

    def sum_over_ranks(self, layer_score: Tensor) -> Tensor:
        return layer_score

    def exchange(self, failed: bool, digest: bytes) -> Verdict:
        self.digests.append(digest)
        other = self.other_rank
        if failed:
            return Verdict.FAILED
        same = other is None or other[len(self.digests) - 1] == digest
        return Verdict.SAME if same else Verdict.DIFFERENT


class RecordingPolicy(Policy):
    """Notes what another policy decides, and what it is shown.

    ``asked`` are the layers to be scored, ``layers`` those to be decided about.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__(
            policy.config,
            num_layers=policy.num_layers,
            kept_tokens=policy.kept_tokens,
        )
        self.policy = policy
        self.tail = policy.tail
        self.newest = policy.newest
        self.asked: list[int] = []
        self.layers: list[int] = []
        self.decisions: list[LayerDecision] = []
        self.layer_scores: list[Tensor] = []

    def score(
        self, layer: int, window_queries: Tensor, keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        self.asked.append(layer)
        return self.policy.score(layer, window_queries, keys, scale)

    def observe(self, layer: int, layer_score: Tensor) -> Tensor | None:
        return self.policy.observe(layer, layer_score)

    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        self.layers.append(layer)
        decision = self.policy.decide(layer, layer_score, head_scores, observed)
        self.decisions.append(decision)
        self.layer_scores.append(layer_score)
        return decision


def config(**options: object) -> AslConfig:
    """Options that fit the toy's few layers and short prompts."""
    defaults = {"policy": "asl", "window": WINDOW, "pool_kernel": 3, "l_min": 1}
    return AslConfig.from_dict({**defaults, "l_obs": 2, **options})


def job(
    name: str = "request", n: int = 44, pruned: int = 24, policy: str = "asl"
) -> PrefillJob:
    """A random prompt of n tokens; its slots, blocks of one token, are in no order."""
    random = torch.Generator().manual_seed(n)
    tokens = torch.randint(VOCABULARY, (n,), generator=random).tolist()
    slots = (torch.randperm(n - pruned - 1, generator=random) * 3 + 1000).tolist()
    return PrefillJob(
        request_id=name,
        policy=policy,
        prompt_token_ids=tokens,
        pruned_blocks=pruned,
        block_size=1,
        block_ids=[slots],
    )


def buffers(
    capacity: int = CAPACITY, window: int = WINDOW, packed: int = 1
) -> PrefillBuffers:
    return PrefillBuffers(SHAPE, capacity, window, packed=packed)


def factory(
    model: ToyDecoder,
    *,
    chunk: int = 16,
    capacity: int = CAPACITY,
    packed: int = 1,
    **options: object,
) -> PrefillFactory:
    held = buffers(capacity, packed=packed)
    return PrefillFactory(model, held, config(**options), chunk)


@dataclass
class Run:
    """A finished prefill and all that it did."""

    model: ToyDecoder
    policy: RecordingPolicy
    report: PrefillReport


def prefill(
    work: PrefillJob,
    *,
    model: ToyDecoder | None = None,
    lent: PrefillBuffers | None = None,
    chunk: int = 16,
    **options: object,
) -> tuple[Prefill, ToyDecoder, RecordingPolicy]:
    """A `Prefill` that is not begun yet."""
    model = model or ToyDecoder()
    scored = model.shape.scored_layers
    settings = config(policy=work.policy, **options).counted_in(scored)
    made = make_policy(
        work.policy, settings, num_layers=len(scored), kept_tokens=work.kept_tokens
    )
    made.newest = model.shape.widest_window
    policy = RecordingPolicy(made)
    begun = Prefill(
        work,
        model,
        policy,
        lent or buffers(),
        chunk_tokens=chunk,
    )
    return begun, model, policy


def run(work: PrefillJob, step: int = 10**9, **options: object) -> Run:
    """Prefills ``work`` to the end, ``step`` token-layers at a time."""
    begun, model, policy = prefill(work, **options)  # type: ignore[arg-type]
    while not begun.done:
        begun.advance(step)
    return Run(model, policy, begun.report())


def same(one: Run, other: Run) -> None:
    """Both runs decided and wrote the same, to the bit."""
    assert one.report.selection_layer == other.report.selection_layer
    assert one.policy.layers == other.policy.layers
    for mine, theirs in zip(one.policy.decisions, other.policy.decisions, strict=True):
        for tokens, others in (
            (mine.kept, theirs.kept),
            (mine.deeper, theirs.deeper),
        ):
            if isinstance(tokens, Tensor) and isinstance(others, Tensor):
                assert torch.equal(tokens, others)
            else:
                assert tokens is others
    assert one.model.written.keys() == other.model.written.keys()
    for place, (key, value) in one.model.written.items():
        assert torch.equal(key, other.model.written[place][0]), place
        assert torch.equal(value, other.model.written[place][1]), place
