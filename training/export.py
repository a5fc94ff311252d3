"""Writes a trained model as a folder that transformers and vLLM read."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.model import Decoder
from training.vocabulary import TOKENIZER_DIR

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def qwen3_weights(model: Decoder) -> dict[str, Tensor]:
    """The weights by Qwen3's names; the shared layer's once for each of its layers."""
    weights = {
        "model.embed_tokens.weight": model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(model.layers(model.config.loops)):
        for name, parameter in layer.named_parameters():
            weights[f"model.layers.{index}.{name}"] = parameter
    return {name: weight.detach() for name, weight in weights.items()}


def save(model: Decoder, output: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Config, weights in dtype and the tokenizer's files, in the folder output."""
    output.mkdir(parents=True, exist_ok=True)
    config = model.config.to_qwen3() | {"torch_dtype": str(dtype).partition(".")[2]}
    (output / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    # Copied each: the file format takes no two names for one tensor.
    weights = {
        n: w.to("cpu", dtype, copy=True) for n, w in qwen3_weights(model).items()
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    for name in _COPIED:
        shutil.copyfile(TOKENIZER_DIR / name, output / name)
