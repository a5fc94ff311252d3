"""Exact match of models by task and length: ``python -m training.evaluate MODEL...``.

Prompts are those of the tests (asl_vllm_testing.oracle.tasks), and for hops those of
training/tasks.py, from a seed on; training never uses them. An answer counts if each
of its tokens is the most probable one after the right ones before it, which is to say
if greedy decoding gives it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from asl_vllm_testing.oracle.tasks import key_value, needle
from training.tasks import hops_prompt

LENGTHS = (256, 512, 1024, 2048, 4096)
MOST_HOPS = 4
_BATCH_TOKENS = 4096

Example = tuple[list[int], list[int]]
"""Ids of a prompt and of its answer."""


def _hops(hop: int) -> Callable[[int, int], Example]:
    def make(seed: int, num_tokens: int) -> Example:
        text = hops_prompt(seed, num_tokens, hop)
        return text.ids, text.asked[0][1].answer

    return make


def _from_tests(make: Callable[..., object]) -> Callable[[int, int], Example]:
    def example(seed: int, num_tokens: int) -> Example:
        prompt = make(seed, num_tokens)
        return prompt.token_ids, prompt.answer_ids  # type: ignore[attr-defined]

    return example


TASKS: dict[str, Callable[[int, int], Example]] = {
    "needle": _from_tests(needle),
    "key_value": _from_tests(key_value),
    **{f"hops_{hop}": _hops(hop) for hop in range(1, MOST_HOPS + 1)},
}


@torch.inference_mode()
def exact_match(
    model: torch.nn.Module, task: str, num_tokens: int, count: int, first: int = 0
) -> int:
    """How many of `count` prompts of num_tokens tokens are answered right.

    Their seeds are consecutive, from `first` on.
    """
    # The answer follows the prompt, so the prompt is that much shorter than the
    # longest text a model takes.
    examples = [
        TASKS[task](seed, num_tokens - 4) for seed in range(first, first + count)
    ]
    size = max(1, _BATCH_TOKENS // num_tokens)
    right = 0
    for start in range(0, count, size):
        part = examples[start : start + size]
        answers = torch.tensor([answer for _, answer in part])
        ids = torch.tensor([prompt + answer[:-1] for prompt, answer in part])
        logits = model(ids, logits_to_keep=answers.shape[1], use_cache=False).logits
        right += int((logits.argmax(-1) == answers).all(-1).sum())
    return right


def main() -> None:
    """Prints a Markdown table of exact match in per cent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders of models")
    parser.add_argument("--count", type=int, default=100, help="prompts a cell")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    args = parser.parse_args()
    print("| model | task |", *(f"{length} |" for length in args.lengths))
    print("|---|---|" + "---|" * len(args.lengths))
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for task in args.tasks:
            print(f"| {path.name} | {task} |", end="", flush=True)
            for length in args.lengths:
                right = exact_match(model, task, length, args.count, args.seed)
                print(f" {100 * right / args.count:.0f} |", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
