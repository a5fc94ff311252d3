#!/usr/bin/env python3
"""Serves a real model and asks it about a long text under several budgets.

Run by ``make demo-chat``. The model is SmolLM2-135M-Instruct, downloaded once into
the user's cache; the text is this repository's LICENSE. The same question goes to
``/v1/chat/completions`` with each of `BUDGETS`, and the answers are printed beside one
another. A model this small is often wrong: what is to be seen is what a budget changes.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import demo
from demo import BLOCK_SIZE, DemoError

from asl_vllm_testing import real_model

TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
QUESTION = 'What does the text above say that "Derivative Works" are?'
BUDGETS: tuple[int | None, ...] = (None, 1024, 512, 256)
MAX_TOKENS = 64
WIDTH = 34
"""Letters of a column."""
MODEL_NAME = "smollm2"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of the question under one budget."""

    budget: int | None
    text: str
    prompt_tokens: int
    kept_tokens: int
    freed_blocks: int
    """Blocks of `demo.BLOCK_SIZE` tokens that the prompt no longer holds."""
    selection_layer: int | None
    seconds: float

    def lines(self, width: int) -> list[str]:
        """A column: the numbers, a rule, the answer."""
        blocks = -(-self.prompt_tokens // BLOCK_SIZE) - self.freed_blocks
        pruned = self.kept_tokens < self.prompt_tokens
        layer = "none" if self.selection_layer is None else str(self.selection_layer)
        return [
            f"kv_budget {'null' if self.budget is None else self.budget}",
            f"time {self.seconds:.1f} s",
            f"KV blocks held {blocks}",
            f"tokens kept {self.kept_tokens} of {self.prompt_tokens}",
            f"selection layer {layer if pruned else '-'}",
            "-" * width,
            *textwrap.wrap(self.text.strip(), width),
        ]


def side_by_side(answers: Sequence[Answer], width: int = WIDTH) -> str:
    """A column for each answer."""
    columns = [answer.lines(width) for answer in answers]
    return "\n".join(
        " | ".join(part.ljust(width) for part in line).rstrip()
        for line in zip_longest(*columns, fillvalue="")
    )


def serve_command(model: Path, port: int) -> list[str]:
    """The command line of ``vllm serve``."""
    return [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(model),
        *("--served-model-name", MODEL_NAME),
        *("--kv-policy", "asl"),
        *("--dtype", "float32" if demo.is_cpu_build() else "bfloat16"),
        *("--max-model-len", "4096"),
        *("--block-size", str(BLOCK_SIZE)),
        "--enforce-eager",  # starts sooner
        "--no-enable-prefix-caching",  # each budget computes the prompt anew
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


def ask(client: Any, text: str, budget: int | None) -> Answer:
    """Sends text and question with a budget; raises the client's errors."""
    started = time.perf_counter()
    reply = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": f"{text}\n\n{QUESTION}"}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"kv_budget": budget},
    )
    seconds = time.perf_counter() - started
    report = (reply.usage.model_extra or {}).get("kv_cache") or {}
    prompt_tokens = reply.usage.prompt_tokens
    return Answer(
        budget=budget,
        text=reply.choices[0].message.content or "",
        prompt_tokens=prompt_tokens,
        kept_tokens=report.get("kept_tokens", prompt_tokens),
        freed_blocks=report.get("freed_blocks", 0),
        selection_layer=report.get("selection_layer"),
        seconds=seconds,
    )


def ask_all(url: str) -> bool:
    """Prints the answers; whether each budget was kept to."""
    text = TEXT.read_text()
    print(f"Text: {TEXT.name}, {len(text.split())} words. Question: {QUESTION}")
    with demo.client_of(url, 600) as client:
        for budget in (BUDGETS[-1], None):  # warms up, so that times compare
            ask(client, text[: len(text) // 4], budget)
        answers = []
        for budget in BUDGETS:
            print(f"  asking with kv_budget {budget} ...", flush=True)
            answers.append(ask(client, text, budget))
    print(f"\n{side_by_side(answers)}")
    return all(a.budget is None or a.kept_tokens <= a.budget for a in answers)


def run() -> bool:
    """Serves the model and asks it; whether each budget was kept to."""
    try:
        model = real_model.fetch()
    except RuntimeError as error:
        raise DemoError(str(error)) from error
    print(f"Model: {model}")
    port = demo.free_port()
    url = f"http://127.0.0.1:{port}"
    return demo.serve_and_ask(serve_command(model, port), url, ask_all)


def main() -> int:
    """Runs the demo; the exit status."""
    return demo.end_of(run, "Every budget was kept to.", "A budget was NOT kept to.")


if __name__ == "__main__":
    sys.exit(main())
