"""Random-weight models on disk, small enough to serve in a test.

They answer nothing sensibly, but their attention is peaked and differs from head to
head, so a run that reads a wrong cache entry gives other logits.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BOS, EOS, PAD = 1, 2, 0
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
ROPE_THETA = 10000.0
SCORE_STD = 3.0  # of q k / sqrt(D): peaked rows, yet many tokens with some weight
LOGIT_STD = 3.0
BRANCH = 0.35  # size of an attention or MLP branch beside the embedding's


RANDOM_SHAPE = {
    "layers": 8,
    "hidden": 96,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 160,
}
"""GQA, 8 layers, ranks that settle halfway."""


def write_random_model(
    directory: str | Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int = 512,
    arch: str = "qwen3",
    max_position: int = 32768,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    settle: float = 1.0,
    tie_word_embeddings: bool = False,
    device: str = "cpu",
    weights: bool = True,
) -> Path:
    """Write config, weights and a whitespace tokenizer; return the directory.

    Weights, which are those of a seed and a device they are drawn on, may be left out.

    Words of the tokenizer are `w4` ... `w<vocab-1>`. The query and key projections
    drift from independent ones at the first layer to shared ones from mid depth on, so
    the layers come to agree on what matters, as trained models' do, and the rule
    selects; settle 0 makes every layer independent, and the rule never does.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "do_sample": False,
        },
    )
    _write_tokenizer(directory, vocab)
    if not weights:
        return directory
    generator = torch.Generator(device).manual_seed(seed)
    save_file(
        {
            name: tensor.to("cpu", dtype).contiguous()
            for name, tensor in _weights(config, generator, settle).items()
        },
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def _weights(config: dict, generator: torch.Generator, settle: float) -> dict:
    """The model's tensors in fp32, under their names in a checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim, vocab = config["head_dim"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    num_layers = config["num_hidden_layers"]
    qwen3 = config["model_type"] == "qwen3"
    gain = math.sqrt(SCORE_STD)  # on q and on k

    def normal(rows: int, columns: int, std: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=generator.device)
        return drawn * std

    projection = (1.0 if qwen3 else gain) / math.sqrt(hidden)
    shared = {
        "q_proj": normal(q_rows, hidden, projection),
        "k_proj": normal(kv_rows, hidden, projection),
    }
    weights = {
        "model.embed_tokens.weight": normal(vocab, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        std = LOGIT_STD / math.sqrt(hidden)
        weights["lm_head.weight"] = normal(vocab, hidden, std)
    for index in range(num_layers):
        depth = min(1.0, 2 * index / num_layers)
        angle = settle * depth * math.pi / 2
        prefix = f"model.layers.{index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        for name, common in shared.items():
            own = normal(*common.shape, projection)
            mixed = math.sin(angle) * common + math.cos(angle) * own
            weights[f"{attn}{name}.weight"] = mixed
        weights |= {
            attn + "v_proj.weight": normal(kv_rows, hidden, 1 / math.sqrt(hidden)),
            attn + "o_proj.weight": normal(hidden, q_rows, BRANCH / math.sqrt(q_rows)),
            mlp + "gate_proj.weight": normal(inner, hidden, 1 / math.sqrt(hidden)),
            mlp + "up_proj.weight": normal(inner, hidden, 1 / math.sqrt(hidden)),
            mlp + "down_proj.weight": normal(hidden, inner, BRANCH / math.sqrt(inner)),
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
        }
        if qwen3:
            weights[attn + "q_norm.weight"] = torch.full((head_dim,), gain)
            weights[attn + "k_norm.weight"] = torch.full((head_dim,), gain)
    return weights


def _write_tokenizer(directory: Path, vocab: int) -> None:
    """A tokenizer that splits on white space and puts BOS first."""
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocab)]
    special = [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(SPECIAL)
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
