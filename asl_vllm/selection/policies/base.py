"""What a policy is: shown a layer's scores, it says what stays and what goes deeper."""

from __future__ import annotations

import abc
import dataclasses
import enum
from typing import ClassVar

import torch
from torch import Tensor

from asl_kernels.window_scores import window_scores
from asl_vllm.config import AslConfig
from asl_vllm.selection.kept import best_and_tail


class Keep(enum.Enum):
    """Where a decision says no token by token what stays."""

    NONE = "none"
    ALL = "all"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerDecision:
    """What becomes of a layer's tokens, which are counted from 0 in its own input.

    Raises:
        ValueError: ``deeper`` is `Keep.NONE`, or a restart keeps tokens or names none.
    """

    kept: Tensor | Keep
    """int64 ``[Hkv, k]``, ascending: the tokens whose K and V each KV head keeps.
    `Keep.NONE`: none, since a restart will keep others in their place."""
    deeper: Tensor | Keep = Keep.ALL
    """int64 ``[p]``, ascending, p at least k, the last token among them: the tokens
    that go deeper; or `Keep.ALL`."""
    ratio: float | None = None
    """Rank variance relative to the first checked layer's; None: not checked."""
    restart: bool = False
    """``deeper`` run again from layer 0, as a prompt of their own without the others.
    Then ``kept`` is `Keep.NONE`."""

    def __post_init__(self) -> None:
        if self.deeper is Keep.NONE:
            raise ValueError("deeper: got Keep.NONE; allowed: tokens, or Keep.ALL.")
        if not self.restart:
            return
        if self.kept is not Keep.NONE or self.deeper is Keep.ALL:
            raise ValueError(
                "restart: got kept tokens, or no tokens to start over with; allowed: "
                "kept=Keep.NONE and the tokens in deeper."
            )


class Policy(abc.ABC):
    """Decides, layer by layer, for one prompt; not to be reused for another.

    For each layer in turn that has more than k tokens, the prefill calls `score`,
    `observe` and `decide`. A layer of k tokens keeps them all. A prompt with scores
    that are not finite fails, though not always at once (see `decide`).
    """

    selects_once: ClassVar[bool] = False
    """Tokens are dropped after one layer only, so that the layers up to it may keep
    every token."""

    restarts: ClassVar[bool] = False
    """Its decisions may be restarts: not for models with sliding windows."""

    def __init__(self, config: AslConfig, *, num_layers: int, kept_tokens: int) -> None:
        """Sets the policy up for a prompt.

        Args:
            config: The options.
            num_layers: L, the model's depth.
            kept_tokens: k, tokens a layer keeps, the window included.

        Raises:
            ValueError: ``kept_tokens`` leaves nothing beside the window.
        """
        if kept_tokens <= config.window:
            raise ValueError(
                f"kept_tokens: got {kept_tokens}; allowed: above the window of "
                f"{config.window} tokens."
            )
        self.config = config
        self.num_layers = num_layers
        self.kept_tokens = kept_tokens
        self._best: tuple[Tensor, Tensor] | None = None
        self.tail = config.window
        """Last tokens of a layer that have no score and always stay."""
        self.newest = 0
        """Last tokens that must go deeper, if more than the tail: what layers with a
        sliding window see of the newest one. The prefill says so."""

    @classmethod
    def most_deeper(cls, config: AslConfig, num_tokens: int, kept_tokens: int) -> int:
        """Of so many tokens, the most that pass a layer after any were dropped.

        A prompt over a cached prefix passes with others where these are few. By
        default as many as before: it passes alone.
        """
        return num_tokens

    def score(
        self, layer: int, window_queries: Tensor, keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor] | None:
        """Scores a layer's tokens before the tail: by default as SnapKV does.

        Args:
            layer: 0-based.
            window_queries: ``[W, H, D]`` of this rank's query heads.
            keys: ``[M, Hkv, D]`` of this rank's KV heads, M above k.
            scale: The layer's factor on ``q @ k``.

        Returns:
            Head scores, fp32 ``[Hkv, M - tail]``, and their sum over these KV heads.
            None: `decide` is not asked, the layer keeps no tokens and sends all of
            them deeper, where a later layer restarts.
        """
        return self.attention_scores(
            window_queries,
            keys,
            scale,
            pool_kernel=self.config.pool_kernel,
            reach=self.config.reach,
        )

    def observe(self, layer: int, layer_score: Tensor) -> Tensor | None:
        """A number of a layer's score that `decide` needs on the host; by default none.

        The prefill reads it together with the check that scores are finite, so that a
        layer makes the host wait for the device once.

        Args:
            layer: 0-based.
            layer_score: As `decide` gets it, but not checked yet.

        Returns:
            A tensor ``[]`` on the score's device, or None.
        """
        return None

    @abc.abstractmethod
    def decide(
        self,
        layer: int,
        layer_score: Tensor,
        head_scores: Tensor,
        observed: float | None,
    ) -> LayerDecision:
        """Decides about a layer that was scored.

        Args:
            layer: 0-based.
            layer_score: fp32 ``[M - tail]``: head scores summed over all KV heads, of
                all tensor-parallel ranks.
            head_scores: fp32 ``[Hkv, M - tail]`` of this rank's KV heads.
            observed: What `observe` returned for this layer; then all scores are
                known to be finite. Without it they may not be: the prompt then fails
                before anything selected is used, but ``kept`` must be tokens even so.
        """

    def take_best(self, head_scores: Tensor, best: Tensor) -> None:
        """Is given what `best_per_head` will return for these very scores."""
        self._best = head_scores, best

    def best_per_head(self, head_scores: Tensor) -> Tensor:
        """Each KV head's k tokens: its best, and the tail; int64 ``[Hkv, k]``."""
        taken, self._best = self._best, None
        if taken is not None and taken[0] is head_scores:
            return taken[1]
        return best_and_tail(head_scores, self.kept_tokens, self.tail)

    def tokens_deeper(
        self, layer_score: Tensor, count: int | None = None
    ) -> Tensor | Keep:
        """`best_tokens` as they go deeper, beside the `newest` ones.

        As many tokens before these are taken as before the tail otherwise, so that
        the number that goes deeper does not depend on the scores.

        Returns:
            int64 ``[p]``, ascending, p at least ``count``; `Keep.ALL` where none is
            left out.
        """
        if self.newest <= self.tail:
            return self.best_tokens(layer_score, count)
        best = (self.kept_tokens if count is None else count) - self.tail
        before = len(layer_score) + self.tail - self.newest
        if best >= before:
            return Keep.ALL
        return best_and_tail(layer_score[:before], best + self.newest, self.newest)

    def best_tokens(self, layer_score: Tensor, count: int | None = None) -> Tensor:
        """The layer's ``count`` (default: k) tokens: the best, and the tail.

        Returns:
            int64 ``[count]``, ascending.

        Raises:
            ValueError: ``count`` is not above the tail, or above the layer's tokens.
        """
        if count is None:
            count = self.kept_tokens
        return best_and_tail(layer_score, count, self.tail)

    def attention_scores(
        self,
        window_queries: Tensor,
        keys: Tensor,
        scale: float,
        *,
        pool_kernel: int,
        row_weights: Tensor | None = None,
        reach: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """What `score` returns, by the attention of the window."""
        before = len(keys) - self.tail
        layer_score = torch.empty(before, dtype=torch.float32, device=keys.device)
        head_scores = window_scores(
            window_queries,
            keys,
            scale=scale,
            pool_kernel=pool_kernel,
            row_weights=row_weights,
            reach=reach,
            layer_score=layer_score,
        )
        return head_scores, layer_score
