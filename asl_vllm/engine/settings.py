"""What asl_vllm takes of vLLM's configuration, each number from one source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv

from asl_vllm.config import CONFIG_KEY, AslConfig, ConfigError
from asl_vllm.prefill import Bands
from asl_vllm.selection.budget import BudgetError, minimum_budget, validate_budget

_NONE = AslConfig()
_parsed: tuple[str, AslConfig] | None = None


def parse(options: Mapping[str, Any]) -> AslConfig:
    """The config that options say: made once in each process, which has one engine.

    What it was made from, and what its `AslConfig.to_dict` says, give the same again.

    Raises:
        ConfigError: the options are wrong.
    """
    global _parsed
    # Not by equality: 1 is not 1.0, nor True.
    said = repr(dict(options))
    if _parsed is None or said not in (_parsed[0], repr(_parsed[1].to_dict())):
        _parsed = said, AslConfig.from_dict(options)
    return _parsed[1]


def config_of_additional(additional_config: Any) -> AslConfig:
    """The `AslConfig` inside ``additional_config``; the default where there is none.

    Raises:
        ConfigError: the options are wrong.
    """
    given = isinstance(additional_config, Mapping) and CONFIG_KEY in additional_config
    if not given:
        return _NONE
    options = additional_config[CONFIG_KEY]
    return options if isinstance(options, AslConfig) else parse(options)


@dataclass(frozen=True)
class Settings:
    """The options, parsed once, and the sizes that follow from them and the engine.

    Sizes are read when asked for: vLLM settles block size, model length and pool while
    the engine starts, and tells its front ends later.
    """

    config: AslConfig
    vllm_config: VllmConfig = field(repr=False)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        vllm_config = self.vllm_config
        return int(vllm_config.model_config.get_num_layers(vllm_config.parallel_config))

    @cached_property
    def scored_layers(self) -> tuple[int, ...]:
        """Layers that see all tokens, as the model's configuration lists them.

        One that has a window and lists none has it in every layer.
        """
        layers = tuple(range(self.num_layers))
        model = self.vllm_config.model_config
        if self.window_of(model.get_sliding_window()) is None:
            return layers
        kinds = getattr(model.hf_text_config, "layer_types", None) or ()
        return tuple(i for i in layers if kinds and kinds[i] != "sliding_attention")

    def window_of(self, sliding_window: int | None) -> int | None:
        """A layer's window, if it is shorter than the longest sequence; or else None.

        One that is not never leaves a token behind.
        """
        if sliding_window is None or sliding_window >= self.max_model_len:
            return None
        return sliding_window

    @property
    def has_windows(self) -> bool:
        """Whether layers have a sliding window."""
        return len(self.scored_layers) < self.num_layers

    @property
    def bands(self) -> Bands:
        """The bands of the model's layers.

        Raises:
            ValueError: its layers cannot be split into so many.
        """
        return Bands(self.num_layers, self.config.bands)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return int(self.vllm_config.cache_config.block_size)

    @property
    def minimum_budget(self) -> int:
        """Smallest budget in tokens."""
        return minimum_budget(self.config.window, self.block_size)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return int(self.vllm_config.model_config.max_model_len)

    @property
    def prefill_capacity(self) -> int:
        """Tokens of the longest prompt that can be pruned."""
        asked = self.config.max_prefill_tokens
        return self.max_model_len if asked is None else min(asked, self.max_model_len)

    @property
    def step_tokens(self) -> int:
        """Tokens that an engine step may schedule."""
        return int(self.vllm_config.scheduler_config.max_num_batched_tokens)

    @property
    def pass_token_layers(self) -> int:
        """Token-layers that passes may take of one engine step, at least 1."""
        step = self.step_tokens * self.num_layers
        return max(1, int(self.config.pass_share * step))

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one prefill pass; depends on the options only, never on load.

        By default a pass that runs alone in a step stays within ``pass_share``.
        """
        return self.config.chunk_tokens or min(self.step_tokens, self.pass_token_layers)

    @property
    def reads_prefixes(self) -> bool:
        """Whether pruned prompts can take a prefix from the prefix cache.

        Not of a quantised cache: scores are made of keys before they are quantised. Nor
        beside sliding windows, whose layers hold the newest tokens only.
        """
        cache = self.vllm_config.cache_config
        plain = cache.cache_dtype == "auto" and not self.has_windows
        return bool(cache.enable_prefix_caching) and plain

    @property
    def reuse(self) -> str:
        """``kv_reuse`` of requests that name none: "none" where nothing can be read."""
        return self.config.reuse if self.reads_prefixes else "none"

    def usable_blocks(self, pool_blocks: int) -> int:
        """Blocks a band that requests can hold of one engine's pool of so many blocks.

        All bands take theirs from the pool, and a request needs as many in each unless
        bands of it are pruned. Block 0 is the null block, and tokens that speculation
        drafts need room beyond the request's own.
        """
        usable = (pool_blocks - 1) // self.config.bands
        if self.vllm_config.speculative_config is not None:
            # Those of every step in flight: nobody knows yet how many are right.
            steps = self.vllm_config.max_concurrent_batches
            drafted = steps * (1 + self.vllm_config.num_speculative_tokens)
            usable -= cdiv(drafted, self.block_size)
        return max(usable, 0)

    def check_budget(self) -> None:
        """Refuses a default budget below the smallest for the block size in force.

        Asked when the arguments are read, and again when a model is loaded: then vLLM
        settles the block size, unless ``--block-size`` says it.

        Raises:
            ConfigError: it is too small.
        """
        try:
            validate_budget(self.config.budget, minimum=self.minimum_budget)
        except BudgetError as error:
            raise ConfigError(f"--kv-budget: {error}") from None

    def resolved_options(self) -> dict[str, Any]:
        """Every option of `AslConfig`, with the values that stand in for None."""
        scored = self.scored_layers
        rule = self.config.resolved_rule(len(scored))
        if self.has_windows and self.config.l_min is None:
            rule["l_min"] = scored[min(int(rule["l_min"]), len(scored) - 1)]
        return {
            **self.config.to_dict(),
            **rule,
            "reuse": self.reuse,
            "max_prefill_tokens": self.prefill_capacity,
            "chunk_tokens": self.chunk_tokens,
        }


_latest: Settings | None = None


def settings_of(vllm_config: VllmConfig) -> Settings:
    """The settings of an engine; parsed once in each process, which has one engine.

    Raises:
        ConfigError: the options are wrong.
    """
    global _latest
    if _latest is None or _latest.vllm_config is not vllm_config:
        config = config_of_additional(vllm_config.additional_config)
        _latest = Settings(config, vllm_config)
    return _latest
