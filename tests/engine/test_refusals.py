"""Combinations that a policy refuses at start-up, each with a way out."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)

from asl_vllm.config import POLICY_NAMES, ConfigError
from asl_vllm.engine import compat
from asl_vllm.engine.compat import UnsupportedError
from asl_vllm.engine.frontend import connectors, launch
from asl_vllm.engine.settings import settings_of
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.vllm_configs import (
    COHERE2,
    LLAMA_SIZES,
    engine_args,
    engine_config,
    model_dir,
)

ASL = {"policy": "asl"}
LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 240,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {**LLAMA_SIZES, "architectures": ["MistralForCausalLM"]}
MISTRAL_SLIDING = {**MISTRAL, "model_type": "mistral", "sliding_window": 64}
QWEN2 = {**LLAMA_SIZES, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
WINDOWS_ALONE = "Layers with a sliding window beside other features"
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
QWEN3 = {**LLAMA_SIZES, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN3_MOE = {
    **LLAMA_SIZES,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
DEEPSEEK = {
    **LLAMA_SIZES,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
OFFLOADING: dict[str, Any] = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
}
OFFLOADING_MODULE = OffloadingConnector.__module__
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": 240,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "vocab_size": 240,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
QWEN2_AUDIO = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "model_type": "qwen2_audio",
    "text_config": {"model_type": "qwen2", **LLAMA_SIZES},
    "audio_config": {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
    },
}


@dataclass
class Refused:
    """A combination, and the parts that the refusal must have."""

    line: str
    """Its line in docs/limits.md."""
    needed: str
    got: str
    remedy: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of EngineArgs."""
    model: dict[str, Any] | None = None
    """A config.json; None: the tiny retriever's."""
    environment: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    """Of asl_vllm, beside the policy's name."""

    def __str__(self) -> str:
        return self.line


REFUSED = [
    Refused(
        "Pipeline parallelism",
        needed="all layers on each rank",
        got="--pipeline-parallel-size 2",
        remedy="use --tensor-parallel-size",
        arguments={"pipeline_parallel_size": 2},
    ),
    Refused(
        "Decode context parallelism",
        needed="whole sequences on each rank",
        got="--decode-context-parallel-size 2",
        remedy="leave it at 1",
        arguments={"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    ),
    Refused(
        "`--kv-bands` without the hybrid KV-cache manager",
        needed="a block table for each of the bands",
        got="--kv-bands with --disable-hybrid-kv-cache-manager",
        remedy="drop one of the two",
        arguments={"disable_hybrid_kv_cache_manager": True},
        policy={"bands": 5},
    ),
    Refused(
        "Speculative decoding other than n-gram",
        needed="speculation that reads no hidden states or KV cache",
        got="'draft_model'",
        remedy='use {"method": "ngram"} or drop --speculative-config',
        arguments={
            "speculative_config": {
                "method": "draft_model",
                "model": str(TINY_MODEL),
                "num_speculative_tokens": 2,
            }
        },
    ),
    Refused(
        "Prefetched weight offloading",
        needed="layers whose weights are on the device",
        got="prefetched weight offloading",
        remedy="use --cpu-offload-gb",
        arguments={"offload_group_size": 2},
    ),
    Refused(
        "Errors for late compilation",
        needed="kernels that may be compiled when a prompt first needs them",
        got="--jit-monitor-mode error",
        remedy="use warn",
        arguments={"jit_monitor_mode": "error"},
    ),
    Refused(
        "Expandable segments",
        needed="a KV connector",
        got="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        remedy="take expandable_segments out of it",
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
    Refused(
        "LoRA adapters",
        needed="one set of weights",
        got="--enable-lora",
        remedy="merge the adapter",
        arguments={"enable_lora": True},
    ),
    Refused(
        "Another KV connector",
        needed="no KV connector beside its own but vLLM's OffloadingConnector",
        got="'ExampleConnector'",
        remedy="name OffloadingConnector, or drop --kv-transfer-config",
        arguments={
            "kv_transfer_config": KVTransferConfig(
                kv_connector="ExampleConnector", kv_role="kv_both"
            )
        },
    ),
    Refused(
        "Another worker class",
        needed="vLLM's CPU or GPU worker",
        got="'some.other.Worker'",
        remedy="drop --worker-cls",
        arguments={"worker_cls": "some.other.Worker"},
    ),
    Refused(
        "The Rust front end",
        needed="the Python API server",
        got="VLLM_USE_RUST_FRONTEND=1",
        remedy="unset it",
        environment={"VLLM_USE_RUST_FRONTEND": "1"},
    ),
    Refused(
        "Pooling models",
        needed="a generative model",
        got="'pooling'",
        remedy="choose another model",
        arguments={"runner": "pooling"},
    ),
    Refused(
        "Encoder-decoder models",
        needed="a decoder-only model",
        got="an encoder-decoder model",
        remedy="choose another model",
        model=WHISPER,
    ),
    Refused(
        "Multimodal models, but for text alone with `--language-model-only`",
        needed="text prompts",
        got="a multimodal model",
        remedy="pass --language-model-only",
        model=QWEN2_AUDIO,
    ),
    Refused(
        "Multi-head latent attention (MLA)",
        needed="ordinary KV heads",
        got="multi-head latent attention",
        remedy="choose another model",
        model=DEEPSEEK,
    ),
    Refused(
        "State-space and hybrid models",
        needed="attention in every layer",
        got="state-space layers",
        remedy="choose another model",
        model=MAMBA,
    ),
    Refused(
        "Sliding windows in every layer",
        needed="layers that see all tokens beside those with a sliding window",
        got="a sliding window of 64 tokens in every layer",
        remedy="pass --disable-sliding-window, or --max-model-len 64",
        model=MISTRAL_SLIDING,
    ),
    Refused(
        "Chunked attention",
        needed="full or sliding-window attention",
        got="chunked_attention",
        remedy="choose another model",
        model={**COHERE2, "layer_types": ["chunked_attention", "full_attention"] * 2},
    ),
    *(
        Refused(
            WINDOWS_ALONE,
            needed="what works beside layers with a sliding window",
            got=got,
            remedy=remedy,
            model=COHERE2,
            arguments=arguments,
            policy=policy,
        )
        for got, remedy, arguments, policy in (
            (
                "--kv-policy gemfilter",
                "choose asl, fastkv, pyramidinfer, snapkv",
                {},
                {"policy": "gemfilter"},
            ),
            ("--kv-bands", "drop it", {}, {"bands": 2}),
            (
                "--disable-hybrid-kv-cache-manager",
                "drop it",
                {"disable_hybrid_kv_cache_manager": True},
                {},
            ),
            ("--kv-cache-dtype fp8", "use auto", {"kv_cache_dtype": "fp8"}, {}),
            (
                "--speculative-config",
                "drop it",
                {"speculative_config": NGRAM},
                {},
            ),
            (
                "a KV connector",
                "drop --kv-offloading-size",
                {"kv_offloading_size": 1},
                {},
            ),
        )
    ),
    Refused(
        "Mixtures of experts across data-parallel ranks",
        needed="ranks that need not run the same passes",
        got="a mixture of experts with --data-parallel-size 2",
        remedy="use --tensor-parallel-size",
        arguments={"data_parallel_size": 2},
        model=QWEN3_MOE,
    ),
    Refused(
        "Another KV connector",
        needed="no KV connector beside its own but vLLM's OffloadingConnector",
        got="'SimpleCPUOffloadConnector'",
        remedy="name OffloadingConnector",
        arguments={"kv_offloading_size": 1},
        environment={"VLLM_USE_SIMPLE_KV_OFFLOAD": "1"},
    ),
    Refused(
        "Another KV connector",
        needed="no KV connector beside its own but vLLM's OffloadingConnector",
        got="'ExampleConnector'",
        remedy="name OffloadingConnector",
        arguments={
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "connectors": [
                        OFFLOADING,
                        {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
                    ]
                },
            }
        },
    ),
    Refused(
        "Another KV connector",
        needed="no KV connector beside its own but vLLM's OffloadingConnector",
        got=f"'OffloadingConnector' of {OFFLOADING_MODULE}",
        remedy="name OffloadingConnector",
        arguments={
            "kv_transfer_config": OFFLOADING
            | {"kv_connector_module_path": OFFLOADING_MODULE}
        },
    ),
    Refused(
        "Another KV connector",
        needed="at most one KV connector beside its own",
        got="OffloadingConnector and OffloadingConnector",
        remedy="name one of them",
        arguments={"kv_transfer_config": OFFLOADING, "kv_offloading_size": 1},
    ),
    Refused(
        "Another KV connector",
        needed='kv_load_failure_policy "fail"',
        got="'recompute'",
        remedy="drop kv_load_failure_policy",
        arguments={
            "kv_transfer_config": OFFLOADING | {"kv_load_failure_policy": "recompute"}
        },
    ),
    Refused(
        "Another KV connector",
        needed="loads that do not hold up a step",
        got="sync_load_budget_bytes 1024",
        remedy="drop sync_load_budget_bytes",
        arguments={
            "kv_transfer_config": OFFLOADING
            | {"kv_connector_extra_config": {"sync_load_budget_bytes": 1024}}
        },
    ),
]


@dataclass
class Changed:
    """A combination that vLLM refuses by itself, or cannot express, on a CPU.

    It is made by changing a field of a valid configuration.
    """

    line: str
    why: str
    section: str
    fields: dict[str, Any]
    needed: str
    got: str
    remedy: str

    def __str__(self) -> str:
        return self.line


CHANGED = [
    Changed(
        "Prefill context parallelism",
        why="vLLM's V1 model runner, the CPU's, refuses it first",
        section="parallel_config",
        fields={"prefill_context_parallel_size": 2},
        needed="whole sequences on each rank",
        got="--prefill-context-parallel-size 2",
        remedy="leave it at 1",
    ),
    Changed(
        "Dual-batch overlap",
        why="vLLM switches it off on a CPU",
        section="parallel_config",
        fields={"enable_dbo": True},
        needed="one batch a step",
        got="dual-batch overlap",
        remedy="drop --enable-dbo",
    ),
    Changed(
        "KV caches with scales of each token and head",
        why="the CPU's attention has no such cache",
        section="cache_config",
        fields={"cache_dtype": "int8_per_token_head"},
        needed="a KV cache without scales of each token and head",
        got="--kv-cache-dtype int8_per_token_head",
        remedy="use auto or fp8",
    ),
]


def make_model(case: Refused, folder: Path) -> str:
    if case.model is None:
        return str(TINY_MODEL)
    return model_dir(folder / "model", **case.model)


def assert_says(message: str, needed: str, got: str, remedy: str) -> None:
    found = re.fullmatch(
        r"--kv-policy needs (?P<needed>.+); got (?P<got>.+)\. "
        r"Remedy: (?P<remedy>.+), or start with --kv-policy none\.",
        message,
    )
    assert found, message
    assert needed in found["needed"]
    assert got in found["got"]
    assert remedy in found["remedy"]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_with_a_policy(
    case: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    model = make_model(case, tmp_path)
    with pytest.raises(UnsupportedError) as refused:
        engine_config({**ASL, **case.policy}, model=model, **case.arguments)
    assert_says(str(refused.value), case.needed, case.got, case.remedy)


@pytest.mark.parametrize("policy", [None, {"policy": "none"}], ids=["no", "none"])
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_accepted_without_a_policy(
    case: Refused,
    policy: dict[str, Any] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    model = make_model(case, tmp_path)
    config = engine_config(policy, model=model, **case.arguments)
    assert "asl_vllm" not in str(config.parallel_config.worker_cls)


def changed(config: VllmConfig, case: Changed) -> VllmConfig:
    """A copy of the configuration with the case's fields."""
    section = copy.copy(getattr(config, case.section))
    for name, value in case.fields.items():
        assert hasattr(section, name), f"{case.section} has no {name}"
        setattr(section, name, value)
    config = copy.copy(config)
    setattr(config, case.section, section)
    return config


@pytest.mark.parametrize("case", CHANGED, ids=str)
def test_refused_where_vllm_on_a_cpu_cannot_express_it(case: Changed) -> None:
    valid = engine_config(ASL)
    compat.check(valid)
    with pytest.raises(UnsupportedError) as refused:
        compat.check(changed(valid, case))
    assert_says(str(refused.value), case.needed, case.got, case.remedy)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"selection_layer": 10},
            ("selection_layer: got 10", "up to 9", "10 layers"),
        ),
        (
            {"policy": "fastkv", "selection_layer": 10},
            ("selection_layer: got 10", "up to 9", "10 layers"),
        ),
        ({"policy": "gemfilter", "selection_layer": 99}, ("selection_layer: got 99",)),
        ({"propagated_share": 0}, ("propagated_share: got 0", "up to 1")),
        ({"l_min": 10}, ("l_min: got 10", "to 9", "10 layers")),
        ({"l_min": 99}, ("l_min: got 99",)),
        ({"budget": 63}, ("--kv-budget", "got 63", "at least 64", "raise it to 64")),
        ({"budget": 0}, ("--kv-budget", "got 0", "positive")),
        ({"budget": 1.5}, ("--kv-budget", "got 1.5", "up to 1.0")),
        ({"budget": float("nan")}, ("--kv-budget", "got nan")),
        ({"budget": True}, ("--kv-budget", "got True", "a JSON number or null")),
        ({"budget": "64"}, ("--kv-budget", "got '64'", "a JSON number or null")),
        ({"budjet": 64}, ("unknown key(s) budjet", "allowed: ")),
        ({"window": 0}, ("window: got 0", "1 to 64")),
        ({"bands": 3}, ("--kv-bands", "got 3 for 10 layers", "allowed: 1, 2, 5, 10")),
        ({"bands": 20}, ("--kv-bands", "got 20 for 10 layers", "allowed: 1, 2, 5, 10")),
        (
            {"pass_share": 0.001, "chunk_tokens": 4096},
            ("chunk_tokens: got 4096", "pass_share=0.001 leaves", "raise these"),
        ),
        (
            {"chunk_tokens": 10**6},
            ("chunk_tokens: got 1000000", "--max-num-batched-tokens (", "raise these"),
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], said: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        engine_config({**ASL, **options}, block_size=32)
    for part in said:
        assert part in str(refused.value)


def test_a_bad_policy_of_a_package_ends_the_start_of_a_policy_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise ConfigError("entry point 'asl': got 'others:Policy'")

    monkeypatch.setattr(launch, "installed_policies", refuse)
    with pytest.raises(ConfigError, match="entry point 'asl'"):
        engine_config(ASL)
    assert engine_config().kv_transfer_config is None


@pytest.mark.parametrize(
    "options",
    [
        {"selection_layer": 9},
        {"l_min": 9},
        {"l_obs": 99},
        {"budget": 64},
        {"budget": 0.001},
        {"budget": 1.0},
        {"pass_share": 0.5, "chunk_tokens": 512},
        {"bands": 10},
        *({"policy": name} for name in POLICY_NAMES[1:]),
        {"policy": "gemfilter", "selection_layer": 9},
    ],
    ids=str,
)
def test_options_at_their_bounds_are_accepted(options: dict[str, Any]) -> None:
    config = engine_config({**ASL, **options}, block_size=32)
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector == "AslConnector"


@pytest.mark.parametrize(
    "model",
    [
        {**LLAMA_SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {**MISTRAL, "model_type": "mistral", "sliding_window": None},
        {**MISTRAL_SLIDING, "sliding_window": 256},
        COHERE2,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GPT2,
    ],
    ids=lambda model: model["architectures"][0],
)
def test_architectures_are_not_refused_by_name(
    model: dict[str, Any], tmp_path: Path
) -> None:
    """Whether layers can be called one by one shows once the model is loaded."""
    config = engine_config(ASL, model=model_dir(tmp_path / "model", **model))
    assert config.parallel_config.worker_cls in launch.WORKERS.values()


@pytest.mark.parametrize(
    "remedy", [{"disable_sliding_window": True}, {"max_model_len": 64}], ids=str
)
def test_a_window_that_is_never_left_is_none(
    remedy: dict[str, Any], tmp_path: Path
) -> None:
    model = model_dir(tmp_path / "model", **MISTRAL_SLIDING)
    config = engine_config(ASL, model=model, **{"max_model_len": None, **remedy})
    assert config.model_config.max_model_len == 64
    assert not settings_of(config).has_windows


def test_a_multimodal_model_may_serve_text(tmp_path: Path) -> None:
    model = model_dir(tmp_path / "model", **QWEN2_AUDIO)
    config = engine_config(ASL, model=model, language_model_only=True)
    assert config.parallel_config.worker_cls in launch.WORKERS.values()
    with pytest.raises(UnsupportedError, match="a multimodal model"):
        engine_config(ASL, model=model, language_model_only=True, enable_mm_embeds=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"speculative_config": NGRAM},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": True},
        {"kv_cache_dtype": "fp8"},
        {"async_scheduling": True},
        {"model_impl": "transformers"},
    ],
    ids=str,
)
def test_what_works_with_a_policy_is_accepted(arguments: dict[str, Any]) -> None:
    config = engine_config(ASL, **arguments)
    assert config.parallel_config.worker_cls in launch.WORKERS.values()


def test_a_configuration_can_be_made_twice() -> None:
    """``vllm serve`` makes one for the front end and one for the engine."""
    args = engine_args(ASL)
    first, second = (args.create_engine_config() for _ in range(2))
    assert first.parallel_config.worker_cls == second.parallel_config.worker_cls
    assert first.kv_transfer_config is not None
    assert second.kv_transfer_config is not None
    assert second.kv_transfer_config.kv_connector == "AslConnector"


def test_another_host_memory_is_refused() -> None:
    """One that vLLM cannot start without a package of its own."""
    with pytest.raises(UnsupportedError, match="got 'LMCacheMPConnector'"):
        engine_config(ASL, kv_offloading_size=1, kv_offloading_backend="lmcache")


def lines_of_limits() -> set[str]:
    """What the document says is refused at start-up, without remarks."""
    _, section = LIMITS.read_text().split("\n## Refused at start-up\n")
    section, _, _ = section.partition("\n## ")
    return set(re.findall(r"^- (.+?)(?: \*.*|: .*)?$", section, re.M))


@pytest.mark.parametrize("line", sorted({case.line for case in [*REFUSED, *CHANGED]}))
def test_each_is_a_line_of_the_limits(line: str) -> None:
    assert line in lines_of_limits()


def texts_of_refusals() -> set[str]:
    """How what is needed begins, of every refusal in the modules that refuse."""
    texts = set()
    for module in (compat, launch, connectors):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                needed = node.value.elts[0]
            elif isinstance(node, ast.Call) and len(node.args) == 3:
                needed = node.args[0]
            else:
                continue
            if isinstance(needed, ast.JoinedStr):
                needed = needed.values[0]
            if isinstance(needed, ast.Constant):
                texts.add(needed.value)
    return texts


def test_every_refusal_of_the_code_is_tried_here() -> None:
    texts = texts_of_refusals()
    assert {
        "all layers on each rank",
        "at most one KV connector beside its own",
    } <= texts
    tried = [case.needed for case in (*REFUSED, *CHANGED)]
    untried = {
        text
        for text in texts
        if not any(text.startswith(n) or n.startswith(text) for n in tried)
    }
    assert not untried
