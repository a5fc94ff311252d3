"""Reading asl_vllm's configuration out of vLLM's."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from asl_vllm.config import CONFIG_KEY, AslConfig, ConfigError
from asl_vllm.prefill import Bands
from asl_vllm.selection.budget import BudgetError, minimum_budget, validate_budget


def config_of_additional(additional_config: Any) -> AslConfig:
    """The `AslConfig` inside ``additional_config``; the default where there is none.

    Raises:
        ConfigError: the options are wrong.
    """
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return AslConfig()
    options = additional_config[CONFIG_KEY]
    return options if isinstance(options, AslConfig) else AslConfig.from_dict(options)


def config_of(vllm_config: VllmConfig) -> AslConfig:
    """The `AslConfig` that travels with a `VllmConfig`."""
    return config_of_additional(vllm_config.additional_config)


def bands_of(vllm_config: VllmConfig) -> Bands:
    """The bands of the model's layers.

    Raises:
        ValueError: its layers cannot be split into so many.
    """
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return Bands(num_layers, config_of(vllm_config).bands)


def prefill_capacity(vllm_config: VllmConfig) -> int:
    """Tokens of the longest prompt that can be pruned."""
    limit: int = vllm_config.model_config.max_model_len
    asked = config_of(vllm_config).max_prefill_tokens
    return limit if asked is None else min(asked, limit)


def resolved_options(vllm_config: VllmConfig) -> dict[str, Any]:
    """Every option of `AslConfig`, with the values that stand in for None."""
    config = config_of(vllm_config)
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return {
        **config.to_dict(),
        **config.resolved_rule(num_layers),
        "max_prefill_tokens": prefill_capacity(vllm_config),
        "chunk_tokens": chunk_tokens(vllm_config),
    }


def pass_token_layers(vllm_config: VllmConfig) -> int:
    """Token-layers that passes may take of one engine step, at least 1."""
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    step = vllm_config.scheduler_config.max_num_batched_tokens * num_layers
    return max(1, int(config_of(vllm_config).pass_share * step))


def chunk_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of one prefill pass; depends on the options only, never on load.

    By default a pass that runs alone in a step stays within ``pass_share``.
    """
    asked = config_of(vllm_config).chunk_tokens
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    return asked or min(step_tokens, pass_token_layers(vllm_config))


def check_budget(vllm_config: VllmConfig) -> None:
    """Refuses a default budget below the smallest for the block size in force.

    Asked when the arguments are read, and again when a model is loaded: then vLLM
    settles the block size, unless ``--block-size`` says it.

    Raises:
        ConfigError: it is too small.
    """
    config = config_of(vllm_config)
    minimum = minimum_budget(config.window, vllm_config.cache_config.block_size)
    try:
        validate_budget(config.budget, minimum=minimum)
    except BudgetError as error:
        raise ConfigError(f"--kv-budget: {error}") from None
