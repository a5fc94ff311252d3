"""Combinations that a pruning server refuses at start-up, with reason and remedy.

Each is a line of docs/limits.md too.
"""

from __future__ import annotations

from collections.abc import Iterator

import vllm.envs as envs
from vllm.config import VllmConfig

from asl_vllm.config import ConfigError
from asl_vllm.engine.settings import Settings, settings_of
from asl_vllm.selection.policies import policies_beside_windows


class UnsupportedError(ValueError):
    """This combination does not work with a KV policy: what, got, remedy."""

    def __init__(self, needed: str, got: str, remedy: str) -> None:
        super().__init__(
            f"--kv-policy needs {needed}; got {got}. Remedy: {remedy}, or start "
            "with --kv-policy none."
        )


def check(vllm_config: VllmConfig) -> None:
    """Raises for the first thing in the way of pruning.

    Raises:
        UnsupportedError: a feature of vLLM that cannot be combined with a policy.
        ConfigError: an option that does not fit the model.
    """
    for needed, got, remedy in _obstacles(vllm_config):
        raise UnsupportedError(needed, got, remedy)
    _check_options(settings_of(vllm_config))


def _obstacles(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    yield from _model_obstacles(vllm_config)
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        # Stages would have to hand on which tokens are left, with their states.
        yield (
            "all layers on each rank",
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}",
            "use --tensor-parallel-size instead",
        )
    if parallel.decode_context_parallel_size > 1:
        # Leading blocks of a rank are not leading tokens.
        yield (
            "whole sequences on each rank",
            f"--decode-context-parallel-size {parallel.decode_context_parallel_size}",
            "leave it at 1",
        )
    if parallel.prefill_context_parallel_size > 1:
        # The window's queries do not meet all keys.
        yield (
            "whole sequences on each rank",
            f"--prefill-context-parallel-size {parallel.prefill_context_parallel_size}",
            "leave it at 1",
        )
    if parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe:
        # Ranks forward together: in passes of their own they would wait forever.
        yield (
            "ranks that need not run the same passes",
            "a mixture of experts with --data-parallel-size "
            f"{parallel.data_parallel_size}",
            "use --tensor-parallel-size instead",
        )
    if parallel.use_ubatching:
        # A view of the block table is made for a whole step.
        yield ("one batch a step", "dual-batch overlap", "drop --enable-dbo")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        # Drafters need these of the whole prompt, and would have to be prefilled, too.
        yield (
            "speculation that reads no hidden states or KV cache of its own",
            f"speculative decoding by {speculative.method!r}",
            'use {"method": "ngram"} or drop --speculative-config',
        )
    disabled = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if disabled and settings_of(vllm_config).config.bands > 1:
        yield (
            "a block table for each of the bands",
            "--kv-bands with --disable-hybrid-kv-cache-manager",
            "drop one of the two",
        )
    if vllm_config.observability_config.jit_monitor_mode == "error":
        # Prefills at start-up run our kernels. That load needs no others was not seen.
        yield (
            "kernels that may be compiled when a prompt first needs them",
            "--jit-monitor-mode error",
            "use warn",
        )
    yield from _memory_obstacles(vllm_config)
    if vllm_config.lora_config is not None:
        # vLLM sets adapters up per batch: each pass would set its prompt's instead.
        yield ("one set of weights", "--enable-lora", "drop it or merge the adapter")
    if envs.VLLM_USE_RUST_FRONTEND:
        yield (
            "the Python API server, which validates kv_budget",
            "VLLM_USE_RUST_FRONTEND=1",
            "unset it",
        )


def _memory_obstacles(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype.endswith("per_token_head"):
        # Its scales lie beside the pool, where a pass over other pages finds them.
        yield (
            "a KV cache without scales of each token and head",
            f"--kv-cache-dtype {cache_dtype}",
            "use auto or fp8",
        )
    offload = vllm_config.offload_config
    chosen = offload.offload_backend
    groups = offload.prefetch.offload_group_size
    if chosen == "prefetch" or (chosen == "auto" and groups > 0):
        # It loads the weights of the next layer in turn, and passes take no turns.
        yield (
            "layers whose weights are on the device when they are called",
            "prefetched weight offloading (--offload-backend prefetch, "
            "--offload-group-size)",
            "use --cpu-offload-gb, or drop it",
        )


def _model_obstacles(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    model = vllm_config.model_config
    remedy = "choose another model"
    if model.runner_type != "generate":
        yield ("a generative model", f"runner {model.runner_type!r}", remedy)
    if model.is_encoder_decoder:
        # Keys of cross attention are no prompt tokens.
        yield ("a decoder-only model", "an encoder-decoder model", remedy)
    if model.supports_multimodal_inputs:
        # The runner embeds images, at positions of several numbers; passes do not.
        yield (
            "text prompts",
            "a multimodal model",
            "pass --language-model-only, without --enable-mm-embeds",
        )
    if model.use_mla:
        # One latent vector a token, no keys a head, is there to be scored.
        yield ("ordinary KV heads", "multi-head latent attention (MLA)", remedy)
    if model.is_hybrid or model.is_attention_free or model.has_inner_state:
        yield ("attention in every layer", "state-space layers", remedy)
    types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    odd = sorted(types - {"full_attention", "attention", "sliding_attention"})
    if odd:
        yield ("full or sliding-window attention", ", ".join(odd), remedy)
    if settings_of(vllm_config).has_windows:
        yield from _window_obstacles(vllm_config)


def _window_obstacles(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    settings = settings_of(vllm_config)
    if not settings.scored_layers:
        window = vllm_config.model_config.get_sliding_window()
        yield (
            "layers that see all tokens beside those with a sliding window",
            f"a sliding window of {window} tokens in every layer",
            f"pass --disable-sliding-window, or --max-model-len {window}",
        )
    beside = "beside layers with a sliding window"
    cache_dtype = vllm_config.cache_config.cache_dtype
    transfer = vllm_config.kv_transfer_config
    policy, able = settings.config.policy, policies_beside_windows()
    for given, got, remedy in (
        (
            policy not in ("none", *able),
            f"--kv-policy {policy}",
            f"choose {', '.join(able)}",
        ),
        (settings.config.bands > 1, "--kv-bands", "drop it"),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "--disable-hybrid-kv-cache-manager",
            "drop it",
        ),
        (cache_dtype != "auto", f"--kv-cache-dtype {cache_dtype}", "use auto"),
        (
            vllm_config.speculative_config is not None,
            "--speculative-config",
            "drop it",
        ),
        (
            transfer is not None and transfer.kv_connector == "AslMultiConnector",
            "a KV connector",
            "drop --kv-offloading-size and --kv-transfer-config",
        ),
    ):
        if given:
            yield (f"what works {beside}", f"{got} {beside}", remedy)


def _check_options(settings: Settings) -> None:
    config = settings.config
    config.check_depth(settings.num_layers)
    config.counted_in(settings.scored_layers)
    try:
        _ = settings.bands
    except ValueError as error:
        raise ConfigError(f"--kv-bands: {error}") from None
    step = settings.step_tokens
    # vLLM reserves memory for the activations of a step's tokens.
    most = min(settings.pass_token_layers, step)
    if config.chunk_tokens is not None and config.chunk_tokens > most:
        raise ConfigError(
            f"chunk_tokens: got {config.chunk_tokens}; allowed: up to {most}, the "
            f"lesser of --max-num-batched-tokens ({step}) and what "
            f"pass_share={config.pass_share} leaves of a step; raise these, or leave "
            "chunk_tokens out."
        )
    settings.check_budget()
