"""Prompts with a KV-cache budget each, without a server.

``python examples/offline_batch.py [MODEL]``, by default the small model beside it.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

HERE = Path(__file__).parent
# Shorter than the default of 32 tokens, so that small budgets are allowed.
POLICY = {"policy": "asl", "window": 8}


def main() -> None:
    """Asks one question under three budgets in one batch."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "deep_retriever")
    llm = LLM(
        model,
        dtype="float32",
        block_size=32,
        max_model_len=4096,
        # Enough for the small model, and a quick start. Leave both out for yours.
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        additional_config={"asl_vllm": POLICY},
    )
    prompt = (HERE / "document.txt").read_text() + "question : the red key is"
    budgets = (None, 512, 0.1)
    params = [
        SamplingParams(temperature=0, max_tokens=4, extra_args={"kv_budget": budget})
        for budget in budgets
    ]
    for budget, output in zip(budgets, llm.generate([prompt] * 3, params), strict=True):
        report = output.kv_transfer_params or {}
        answer = output.outputs[0].text.strip()
        kept = report.get("kept_tokens", len(output.prompt_token_ids))
        print(f"kv_budget {budget}: {answer} (kept {kept} tokens)")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
