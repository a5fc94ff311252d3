"""``python -m benchmarks.accuracy.recording MODEL``: what selection sees of prompts.

Each prompt is run once, unpruned. Its file has what the last tokens of the prompt
attend to, which is all that selection knows, and what the right answer attends to,
which is what a cache should have kept. `benchmarks.accuracy.replaying` tries settings
on it without the model. For small Qwen3 and Llama models, as
`benchmarks.accuracy.direct`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.accuracy.prompts import SPLITS, Prompt, PromptMaker
from benchmarks.accuracy.shared_layers import FusedDecoder, SharedLayers
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tokens import HubTokenizer

WINDOWS = (8, 16, 32, 64)
"""Observation windows that can be tried; of a prompt's last tokens."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A prompt of N tokens in L layers of Hkv KV heads."""

    seen: Tensor
    """fp32 ``[windows, L, Hkv, N]``: attention of each of `WINDOWS` to each token,
    summed over the window's rows and the heads of a KV head. Not pooled."""
    asked: Tensor
    """fp32 ``[L, Hkv, N]``: likewise of the answer's tokens, divided by their number
    and that of the heads: shares."""
    spans: Tensor
    """int64 ``[n, 2]``: first token, and that behind the last, of each place where
    the prompt has the answer. n is 0 where it is written otherwise."""
    right: Tensor
    """bool ``[tokens of the answer]``: the unpruned model's likeliest token, after the
    right ones before it."""

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in vars(self).items()}, part)
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What `save` wrote."""
        return cls(**load_file(path))


class Recorder:
    """Records prompts of one model."""

    def __init__(self, model: str, template: str, split: str, seed: int) -> None:
        self.tokenizer = HubTokenizer(model, template)
        self.maker = PromptMaker(self.tokenizer, split=split, seed=seed)
        self.layers = SharedLayers(FusedDecoder.load(model))

    @torch.inference_mode()
    def record(self, prompt: Prompt) -> Recording:
        """Runs the prompt, then its right answer after it."""
        layers, model = self.layers, self.layers.model
        text = self.tokenizer.decode(prompt.token_ids)
        # Prompts end with the answer's beginning: in a quotation, or before a space.
        space = "" if text.endswith('"') else " "
        answer = self.tokenizer.ids(space + prompt.answers[0])
        layers.begin_prompt(prompt.token_ids)
        first = len(prompt.token_ids) - 1
        positions = torch.arange(first, first + len(answer))
        hidden = model.embed(torch.tensor([prompt.token_ids[-1], *answer[:-1]]))
        seen, asked = [], []
        for index, out in enumerate(layers.unpruned_layers()):
            rows = attention(out.q[-max(WINDOWS) :], out.k).sum(1)
            seen.append(torch.stack([rows[:, -window:].sum(1) for window in WINDOWS]))
            past = (out.k[:-1], out.v[:-1])
            more = model.layer(index, hidden, positions, past)
            hidden = more.hidden
            after = attention(more.q, torch.cat([past[0], more.k])).mean((1, 2))
            asked.append(after[:, : len(out.k)])
        found = model.logits(hidden).argmax(-1)
        return Recording(
            torch.stack(seen, 1),
            torch.stack(asked),
            spans(self.tokenizer, prompt),
            found == torch.tensor(answer),
        )


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Causal attention of the last n of M tokens.

    Args:
        queries: ``[n, H, D]``.
        keys: ``[M, Hkv, D]``.

    Returns:
        fp32 ``[Hkv, H / Hkv, n, M]``.
    """
    count, _, dim = queries.shape
    tokens, kv_heads, _ = keys.shape
    by_head = queries.transpose(0, 1) * dim**-0.5
    grouped = by_head.reshape(kv_heads, -1, count, dim)
    logits = (grouped @ keys.permute(1, 2, 0)[:, None]).float()
    later = torch.ones(count, tokens, dtype=torch.bool).triu(tokens - count + 1)
    weights: Tensor = logits.masked_fill_(later, -torch.inf).softmax(-1)
    return weights


def spans(tokenizer: HubTokenizer, prompt: Prompt) -> Tensor:
    """Where the prompt has its first answer; see `Recording.spans`."""
    # Without spaces, which some tokenizers leave to what is between tokens.
    pieces = ["".join(tokenizer.decode([i]).split()) for i in prompt.token_ids]
    ends = list(itertools.accumulate(map(len, pieces)))
    text, answer = "".join(pieces), "".join(prompt.answers[0].split())
    found = []
    at = text.find(answer)
    while at >= 0:
        stop = at + len(answer)
        inside = [
            token
            for token, (piece, end) in enumerate(zip(pieces, ends, strict=True))
            if end > at and end - len(piece) < stop
        ]
        found.append([inside[0], inside[-1] + 1])
        at = text.find(answer, stop)
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def file_name(task: str, length: int, index: int) -> str:
    """Of a prompt's recording."""
    return f"{task}-{length}-{index}.safetensors"


def places(
    tasks: Sequence[str], lengths: Sequence[int], n: int
) -> Iterator[tuple[str, int, int]]:
    """Task, length and number of each prompt, in turn one of each kind."""
    for index, length, task in itertools.product(range(n), lengths, tasks):
        yield task, length, index


def main(arguments: Sequence[str] | None = None) -> None:
    """Records what is not recorded yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.recording")
    add = parser.add_argument
    add("model", help="folder of the model")
    add("--tasks", nargs="+", required=True, choices=list(TASKS))
    add("--lengths", nargs="+", type=int, default=[2048])
    add("--n", type=int, default=50, help="prompts for each task and length")
    add("--template", default="chat", help="as of benchmarks.accuracy")
    add("--split", choices=SPLITS, default="tuning")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--output", type=Path, required=True, help="folder, a file for each prompt")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(args.model, args.template, args.split, args.seed)
    for task, length, index in places(args.tasks, args.lengths, args.n):
        path = args.output / file_name(task, length, index)
        if not path.exists():
            prompt = recorder.maker.prompt(TASKS[task], length, index)
            recorder.record(prompt).save(path)


if __name__ == "__main__":
    main()
