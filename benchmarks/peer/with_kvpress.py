"""What kvpress does with a load; run by the interpreter of its own environment.

Reads an order as JSON from standard input and writes seconds to standard output. It
imports nothing of this repository, whose versions of other packages kvpress refuses.
"""

import json
import sys
import time

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    """Orders have model, prompts, kept, window, pool_kernel, max_tokens, threads."""
    order = json.load(sys.stdin)
    torch.set_num_threads(order["threads"])
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32)
    model.eval()

    def seconds(prompts: list[list[int]], max_tokens: int) -> float:
        ids = torch.tensor(prompts)
        press = SnapKVPress(
            # kvpress rounds tokens down; a half more is the number that is meant.
            compression_ratio=1 - (order["kept"] + 0.5) / ids.shape[1],
            window_size=order["window"],
            kernel_size=order["pool_kernel"],
        )
        began = time.perf_counter()
        with torch.inference_mode(), press(model):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
            )
        assert out.shape[1] == ids.shape[1] + max_tokens
        return time.perf_counter() - began

    seconds([order["prompts"][0][:512]], 2)
    for _ in range(order["rounds"]):
        first = seconds(order["prompts"][:1], 1)
        whole = seconds(order["prompts"][:1], 1 + order["max_tokens"])
        print(json.dumps({"first": first, "more": whole - first}), flush=True)
    if len(order["prompts"]) > 1:
        together = seconds(order["prompts"], 1 + order["max_tokens"])
        print(json.dumps({"together": together}), flush=True)


if __name__ == "__main__":
    main()
