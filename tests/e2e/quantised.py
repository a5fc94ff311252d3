"""The small model with weights of 8 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from asl_vllm_testing import TINY_MODEL

_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}


def write_int8_model(folder: Path) -> Path:
    """Writes it as a compressed-tensors checkpoint: int8 weights with a scale for each
    output channel; activations are quantised token by token as it runs.
    """
    shutil.copytree(TINY_MODEL, folder)
    quantised = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            quantised[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        levels = (weight.float() / scale).round().clamp(-127, 127)
        quantised[name] = levels.to(torch.int8)
        quantised[name.replace("weight", "weight_scale")] = scale.to(weight.dtype)
    save_file(quantised, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    **_EIGHT_BITS,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
