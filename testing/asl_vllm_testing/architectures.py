"""Tiny models of many architectures, with random weights, that the suite runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 240,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_WINDOWS = {
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("sliding_attention", 1e3), ("full_attention", 1e4))
}
DIRECT = "direct calls"
SUM = "pipeline stages, sum"
HIDDEN = "pipeline stages, hidden states"
LIST = "Transformers layers"


@dataclass(frozen=True)
class Architecture:
    """An architecture as checkpoints name it, and how passes call its layers."""

    name: str
    model_type: str
    way: str
    more: dict[str, Any] = field(default_factory=dict)
    """Of its config.json, beside `SIZES`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine."""
    needs: str = ""
    """A package that vLLM imports for it and its CPU build does not bring."""

    def write(self, folder: Path) -> str:
        """A model folder without weights."""
        # Not at the top: what writes docs/models.md needs no vLLM.
        from asl_vllm_testing.vllm_configs import model_dir

        own = {"model_type": self.model_type, "architectures": [self.name]}
        return model_dir(folder, **{**SIZES, **own, **self.more})


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions of several numbers, with so many frequencies each."""
    kind = {"rope_type": "default", "rope_theta": 1e4}
    return {"rope_parameters": {**kind, "mrope_section": list(sections), **more}}


def _text_of(
    name: str,
    model_type: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    needs: str = "torchvision",
) -> Architecture:
    """A multimodal model of which only the text part is loaded."""
    return Architecture(
        name,
        model_type,
        DIRECT,
        {"text_config": {**SIZES, **text}, "vision_config": vision},
        {"language_model_only": True},
        needs,
    )


ARCHITECTURES = (
    Architecture(
        "ApertusForCausalLM",
        "apertus",
        DIRECT,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    Architecture("CohereForCausalLM", "cohere", HIDDEN),
    Architecture("Cohere2ForCausalLM", "cohere2", HIDDEN, _WINDOWS),
    Architecture("Ernie4_5ForCausalLM", "ernie4_5", DIRECT),
    Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        DIRECT,
        {
            **_EXPERTS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    Architecture("Exaone4ForCausalLM", "exaone4", HIDDEN, _WINDOWS),
    Architecture("GPT2LMHeadModel", "gpt2", HIDDEN, {"n_inner": 96}),
    Architecture("GemmaForCausalLM", "gemma", DIRECT),
    Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        DIRECT,
        {**_WINDOWS, "query_pre_attn_scalar": 32, "rope_parameters": _ROPES},
    ),
    Architecture("Glm4ForCausalLM", "glm4", DIRECT),
    Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        DIRECT,
        {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
    Architecture("GraniteForCausalLM", "granite", HIDDEN),
    Architecture("GraniteMoeForCausalLM", "granitemoe", HIDDEN, _EXPERTS),
    Architecture("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", LIST),
    Architecture(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", LIST, {**_EXPERTS, "moe_topk": 2}
    ),
    Architecture("LlamaForCausalLM", "llama", DIRECT),
    # A window in every layer, as long as the longest sequence.
    Architecture("MistralForCausalLM", "mistral", DIRECT, {"sliding_window": 512}),
    _text_of(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral"},
    ),
    Architecture(
        "MixtralForCausalLM", "mixtral", DIRECT, {**_EXPERTS, "sliding_window": None}
    ),
    Architecture("NemotronForCausalLM", "nemotron", DIRECT),
    Architecture("Olmo2ForCausalLM", "olmo2", LIST),
    Architecture("Olmo3ForCausalLM", "olmo3", LIST, _WINDOWS),
    Architecture("OlmoeForCausalLM", "olmoe", DIRECT, _EXPERTS),
    Architecture("Phi3ForCausalLM", "phi3", DIRECT, {"sliding_window": 600}),
    _text_of(
        "PaddleOCRVLForConditionalGeneration",
        "paddleocr_vl",
        {"model_type": "paddleocr_vl_text", **_rope(4, 4, 8)},
        {},
        needs="",
    ),
    _text_of(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", **_rope(4, 6, 6)},
        {},
    ),
    Architecture("Qwen2ForCausalLM", "qwen2", DIRECT),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        DIRECT,
        {**_EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    Architecture("Qwen3ForCausalLM", "qwen3", DIRECT),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        DIRECT,
        {**_EXPERTS, "decoder_sparse_step": 1},
    ),
    _text_of(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {"model_type": "qwen3_vl_text", **_rope(6, 5, 5, mrope_interleaved=True)},
        {},
    ),
    Architecture("SeedOssForCausalLM", "seed_oss", LIST),
    Architecture("SmolLM3ForCausalLM", "smollm3", LIST),
    Architecture("StableLmForCausalLM", "stablelm", HIDDEN),
    Architecture("Starcoder2ForCausalLM", "starcoder2", LIST, {"sliding_window": None}),
)


def table() -> str:
    """A row for each way to call layers, in Markdown."""
    found: dict[str, list[str]] = {}
    for one in ARCHITECTURES:
        found.setdefault(one.way, []).append(f"{one.name}{_notes(one)}")
    rows = [f"| {way} | {', '.join(names)} |" for way, names in found.items()]
    return "\n".join(["| Layers are called by | Architectures |", "|---|---|", *rows])


def _notes(architecture: Architecture) -> str:
    notes = ["text only"] * ("language_model_only" in architecture.options)
    notes += [f"with {architecture.needs}"] * bool(architecture.needs)
    return f" ({', '.join(notes)})" * bool(notes)
