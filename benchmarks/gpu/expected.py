"""What the shipped model answers on a CPU, in fp32.

``python -m benchmarks.gpu.expected`` writes `expected.json` from the plain PyTorch of
`asl_vllm_testing.oracle`, without vLLM and without asl_vllm: the answers to a few
prompts with and without a budget, and what was selected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
MODEL = Path(__file__).parents[2] / "examples" / "deep_retriever"
RULE: dict[str, Any] = {
    "window": 8,
    "pool_kernel": 7,
    "l_min": 5,
    "l_obs": 4,
    "tau": 0.3,
}
"""The rule's defaults for a model of sixteen layers, but for a shorter window."""
BUDGET, BLOCK = 128, 32
MAX_TOKENS = 24
QUESTIONS = (
    ("needle", 1, 600),
    ("key_value", 2, 333),
    ("needle", 3, 450),
    ("key_value", 4, 1024),
    ("needle", 5, 1999),
    ("key_value", 6, 1500),
)
"""Task, seed and length in tokens of each prompt (asl_vllm_testing.oracle.tasks)."""


@dataclass(frozen=True)
class Expected:
    """A prompt, its right answer, and the oracle's answers and choices."""

    prompt: list[int]
    answer: list[int]
    plain: list[int]
    """Tokens after the whole prompt."""
    pruned: list[int]
    """Tokens after the pruned prompt."""
    kept: int
    selection_layer: int | None


def prompts() -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its right answer."""
    from asl_vllm_testing.oracle.tasks import TASKS

    made = [TASKS[task](seed, length) for task, seed, length in QUESTIONS]
    return [(prompt.token_ids, prompt.answer_ids) for prompt in made]


def load() -> list[Expected]:
    """The prompts with what the file says of them."""
    stored = json.loads(FILE.read_text())
    return [
        Expected(prompt, answer, **entry)
        for (prompt, answer), entry in zip(prompts(), stored, strict=True)
    ]


def compute() -> list[dict[str, Any]]:
    """What belongs into the file."""
    from asl_vllm.selection.budget import resolve_kept
    from asl_vllm_testing.oracle.asl import generate
    from asl_vllm_testing.oracle.model import TinyDecoder

    model = TinyDecoder.load(MODEL)
    entries = []
    for prompt, answer in prompts():
        kept = resolve_kept(
            BUDGET,
            num_prompt_tokens=len(prompt),
            block_size=BLOCK,
            window=RULE["window"],
        )
        given = {"max_tokens": MAX_TOKENS, **RULE}
        plain = generate(model, prompt, kept=None, **given)
        pruned = generate(model, prompt, kept=kept, **given)
        assert plain.tokens[: len(answer)] == pruned.tokens[: len(answer)] == answer
        entries.append(
            {
                "plain": plain.tokens,
                "pruned": pruned.tokens,
                "kept": kept,
                "selection_layer": pruned.selection_layer,
            }
        )
    return entries


if __name__ == "__main__":
    FILE.write_text(
        "[\n" + ",\n".join(json.dumps(entry) for entry in compute()) + "\n]\n"
    )
