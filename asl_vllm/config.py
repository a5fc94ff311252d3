"""The one configuration object of asl_vllm.

`AslConfig` holds what ``--kv-policy``, ``--kv-budget`` and ``--kv-policy-config``
say. It is frozen, depends on nothing but the standard library, and travels in
vLLM's ``additional_config["asl_vllm"]`` as a plain dict, so it reaches every
process and works offline as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

BUILT_IN_POLICIES: tuple[str, ...] = (
    "asl",
    "fastkv",
    "gemfilter",
    "pyramidinfer",
    "snapkv",
)
"""Names of the policies of this package, the keys of `asl_vllm.selection.POLICIES`."""

POLICY_GROUP = "asl_vllm.policies"
"""Entry-point group in which other packages name policies of theirs."""

POLICY_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(
        ("none", *BUILT_IN_POLICIES, *sorted(entry_points(group=POLICY_GROUP).names))
    )
)
"""Values of ``--kv-policy``: ``none``, which leaves vLLM as it is, our policies, and
those of installed packages. Only their names are read here; a server with a policy
checks at start-up what they stand for (`asl_vllm.selection.installed_policies`)."""

SHALLOW_MODES: tuple[str, ...] = ("snapkv", "full")
"""Values of ``kv_shallow``: what layers up to the selection layer keep."""

HIDDEN_MEMORY: tuple[str, ...] = ("device", "host")
"""Where the hidden states of a prompt may live while it is prefilled."""

REUSE_MODES: tuple[str, ...] = ("read", "fill", "none")
"""Values of ``kv_reuse``: what a pruned prompt takes from the prefix cache."""

CONFIG_KEY = "asl_vllm"
"""Key of vLLM's ``additional_config`` under which the config travels."""

PRESETS: dict[str, dict[str, int | float]] = {
    # Experiments of arXiv 2601.07667; l_min and l_obs are scaled below.
    "paper": {
        "window": 32,
        "pool_kernel": 7,
        "reach": 1,
        "score_layers": 1,
        "tau": 0.3,
    },
}
"""Settings by name: what options that are left out become."""

_REFERENCE_LAYERS = 32
_REFERENCE_L_MIN = 10
_REFERENCE_L_OBS = 8
_REFERENCE_TAU = 0.3
# A shallow model's ranks do not settle to 0.3 in the layers it has: docs/accuracy.md
# has the figures, of one model of 10 layers and one of 16.
_SHALLOW_LAYERS = 14
_SHALLOW_TAU = 0.9


class ConfigError(ValueError):
    """A bad option: the message says what, got, allowed, and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AslConfig:
    """Options of the pruning policies; a request may name any of them.

    Defaults are the reference settings of ASL (arXiv 2601.07667) for 32 layers, and
    those that the other policies were published with. Layers scale with the model's
    depth unless given, and ``tau`` is higher for shallow models. docs/policies.md says
    which policy reads which option.
    """

    policy: str = "none"
    """Policy of requests that name none, one of `POLICY_NAMES`."""
    budget: int | float | None = None
    """Default ``kv_budget`` of requests that name none; None prunes nothing."""
    bands: int = 1
    """Bands of layers with a block table each, a divisor of the number of layers, for
    ``kv_shallow`` "full"."""
    preset: str | None = dataclasses.field(default=None, init=False)
    """Settings by name, one of `PRESETS`, for options that are left out: ``paper``,
    those of ASL's authors, are the defaults but for a tau of 0.3 at any depth."""
    window: int = 32
    """W: the last prompt tokens whose attention scores the others; always kept."""
    pool_kernel: int = 7
    """S: width of the average pooling of SnapKV's scores over positions; odd."""
    reach: int = 1
    """Tokens that a pooled score reaches, its own the first, so that what follows a
    peak of attention stays, too."""
    score_layers: int = 1
    """asl: layers, the selection layer the last, whose largest scores choose the tokens
    that go deeper."""
    l_min: int | None = None
    """First layer (0-based) whose ranks may count as settled; None: 10/32 of the
    depth."""
    l_obs: int | None = None
    """Layers whose ranks are compared; None: 8/32 of the depth."""
    tau: float | None = None
    """Share of the first checked layer's rank variance below which ranks have settled;
    None: 0.3, or 0.9 for models of fewer than 14 layers."""
    selection_layer: int | None = None
    """Fixes the selection layer (0-based) of asl, fastkv and gemfilter."""
    propagated_share: float = 0.2
    """fastkv: share of the prompt that goes deeper than the selection layer, where that
    is more than the budget."""
    decay_ratio: float = 0.9
    """pyramidinfer: share of a layer's tokens that goes deeper near the last layer; it
    falls to this from 1 at the first."""
    max_prefill_tokens: int | None = None
    """Longest prompt that can be pruned, which sizes the prefill's buffers;
    None: ``max_model_len``."""
    hidden_memory: str = "device"
    """Where a prompt's hidden states live between layers, one of `HIDDEN_MEMORY`:
    ``host``, in pinned memory, copies each row twice a layer."""
    reuse: str = "read"
    """Default ``kv_reuse`` of requests that name none, one of `REUSE_MODES`: ``read``
    takes a prompt's prefix from vLLM's prefix cache where it is there; ``fill`` has an
    ordinary prefill put it there first where it is not. Without prefix caching, or with
    a quantised KV cache, it is ``none``."""
    chunk_tokens: int | None = None
    """Tokens of a prefill pass; None: ``max_num_batched_tokens``, or less where
    ``pass_share`` asks for it."""
    pass_share: float = 1.0
    """Share of an engine step, ``max_num_batched_tokens`` tokens through all layers,
    that prefill passes may take at most."""
    check_integrity: bool = False
    """Debugging: the engine ends with an error where, idle, not each KV block is free
    once."""

    def __post_init__(self) -> None:
        if self.policy not in POLICY_NAMES:
            raise ConfigError(
                f"kv policy: got {self.policy!r}; allowed: {', '.join(POLICY_NAMES)}."
            )
        _check_int("window", self.window, 1, 64)
        _check_int("pool_kernel", self.pool_kernel, 1, 63)
        _check_int("reach", self.reach, 1, 64)
        _check_int("score_layers", self.score_layers, 1, None)
        if self.pool_kernel % 2 == 0:
            raise ConfigError(
                f"pool_kernel: got {self.pool_kernel}; allowed: odd numbers, so that "
                "pooling keeps a score per token."
            )
        for name, low in (
            ("bands", 1),
            ("l_min", 1),
            ("l_obs", 2),
            ("selection_layer", 0),
            ("max_prefill_tokens", 1),
            ("chunk_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, low, None)
        _check_share("propagated_share", self.propagated_share)
        _check_share("decay_ratio", self.decay_ratio)
        _check_share("pass_share", self.pass_share)
        if not isinstance(self.check_integrity, bool):
            raise ConfigError(
                f"check_integrity: got {self.check_integrity!r}; allowed: true, false."
            )
        if self.reuse not in REUSE_MODES:
            raise ConfigError(
                f"reuse: got {self.reuse!r}; allowed: {', '.join(REUSE_MODES)}."
            )
        if self.hidden_memory not in HIDDEN_MEMORY:
            raise ConfigError(
                f"hidden_memory: got {self.hidden_memory!r}; allowed: "
                f"{', '.join(HIDDEN_MEMORY)}."
            )
        tau = self.tau
        if tau is None:
            return
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not tau >= 0:
            raise ConfigError(f"tau: got {tau!r}; allowed: a number of at least 0.")
        if math.isinf(tau):
            raise ConfigError("tau: got inf; allowed: a finite number.")

    @property
    def enabled(self) -> bool:
        """Whether requests may be pruned at all."""
        return self.policy != "none"

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AslConfig:
        """Builds a config from JSON-like options; unknown keys are rejected."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"kv policy config: unknown key(s) {', '.join(unknown)}; allowed: "
                f"{', '.join(sorted(known))}."
            )
        given = dict(options)
        preset = given.pop("preset", None)
        if preset is None:
            return cls(**given)
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(
                f"preset: got {preset!r}; allowed: {', '.join(PRESETS)}, or null."
            )
        config = cls(**{**PRESETS[preset], **given})
        object.__setattr__(config, "preset", preset)  # frozen for others only
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options as a plain dict; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    def counted_in(self, scored: Sequence[int]) -> AslConfig:
        """The options with layers counted among the ``scored`` ones, ascending.

        Raises:
            ConfigError: ``selection_layer`` is none of them.
        """
        changes: dict[str, Any] = {}
        if self.l_min is not None:
            changes["l_min"] = max(1, sum(layer < self.l_min for layer in scored))
        if self.selection_layer is not None:
            if self.selection_layer not in scored:
                raise ConfigError(
                    f"selection_layer: got {self.selection_layer}; allowed: "
                    f"{', '.join(map(str, scored))}, this model's layers without a "
                    "sliding window."
                )
            changes["selection_layer"] = scored.index(self.selection_layer)
        return dataclasses.replace(self, **changes) if changes else self

    def check_depth(self, num_layers: int) -> None:
        """Raises `ConfigError` for a layer that a model of ``num_layers`` has not."""
        # A fixed selection layer leaves l_min without a meaning.
        fixed = self.selection_layer
        name, layer = (
            ("l_min", self.l_min) if fixed is None else ("selection_layer", fixed)
        )
        if layer is not None and layer >= num_layers:
            raise ConfigError(
                f"{name}: got {layer}; allowed: up to {num_layers - 1} for this model "
                f"of {num_layers} layers."
            )

    def resolved_l_min(self, num_layers: int) -> int:
        """First checked layer for a model of ``num_layers``."""
        if self.l_min is not None:
            return self.l_min
        return max(1, round(num_layers * _REFERENCE_L_MIN / _REFERENCE_LAYERS))

    def resolved_l_obs(self, num_layers: int) -> int:
        """Number of observed layers for a model of ``num_layers``."""
        if self.l_obs is not None:
            return self.l_obs
        return max(2, round(num_layers * _REFERENCE_L_OBS / _REFERENCE_LAYERS))

    def resolved_tau(self, num_layers: int) -> float:
        """``tau`` for a model of ``num_layers``."""
        if self.tau is not None:
            return self.tau
        return _SHALLOW_TAU if num_layers < _SHALLOW_LAYERS else _REFERENCE_TAU

    def resolved_rule(self, num_layers: int) -> dict[str, int | float]:
        """``l_min``, ``l_obs`` and ``tau`` for a model of ``num_layers``."""
        return {
            "l_min": self.resolved_l_min(num_layers),
            "l_obs": self.resolved_l_obs(num_layers),
            "tau": self.resolved_tau(num_layers),
        }

    def resolved_selection_layer(self, num_layers: int, reference: int) -> int:
        """``selection_layer``; unless given, as deep as ``reference`` of 32 layers."""
        if self.selection_layer is not None:
            return self.selection_layer
        return round(num_layers * reference / _REFERENCE_LAYERS)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: got {value!r}; allowed: an integer.")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name}: got {value}; allowed: {span}.")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: got {value!r}; allowed: a number.")
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: got {value}; allowed: above 0, up to 1.")
