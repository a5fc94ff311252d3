"""Batches of training texts: ids, positions with jumps, and labels on answers only."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from training.tasks import KINDS, Text, training_text
from training.vocabulary import EOS

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B texts of T tokens.

    labels holds the next token where an answer's token (or EOS behind it) is to be
    predicted, IGNORED elsewhere. question numbers the answers over the batch, -1
    where there is none and at EOS; tasks[i] is the task of question i.
    """

    ids: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64
    question: Tensor  # [B, T] int64
    tasks: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        return Batch(
            self.ids.to(device),
            self.positions.to(device),
            self.labels.to(device),
            self.question.to(device),
            self.tasks,
        )


def make_batch(
    rng: random.Random,
    size: int,
    num_tokens: int,
    weights: tuple[float, ...],
    most_hops: int,
    share: tuple[float, float],
    most_positions: int,
) -> Batch:
    """`size` texts of num_tokens tokens; weights are the kinds', in KINDS' order."""
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    tasks: list[str] = []
    labels = torch.full((size, num_tokens), IGNORED)
    number = torch.full((size, num_tokens), -1)
    for row in range(size):
        kind = rng.choices(KINDS, weights)[0]
        text = training_text(rng, kind, num_tokens, most_hops, share)
        ids.append(text.ids)
        positions.append(jumping_positions(rng, text, most_positions))
        for place, question in text.asked:
            end = place + len(question.answer)
            last = EOS if question.ends else IGNORED
            labels[row, place - 1 : end] = torch.tensor([*question.answer, last])
            number[row, place - 1 : end - 1] = len(tasks)
            tasks.append(question.task)
    return Batch(torch.tensor(ids), torch.tensor(positions), labels, number, tasks)


def jumping_positions(rng: random.Random, text: Text, most: int) -> list[int]:
    """Rising positions below `most` with gaps at a few of the text's borders.

    One time in four there is no gap. Nothing inside a fact or a question is moved
    apart.
    """
    spare = most - len(text.ids)
    if spare < 0:
        raise ValueError(f"{len(text.ids)} tokens do not fit into {most} positions")
    gaps = [0] * (len(text.ids) + 1)
    if rng.random() >= 0.25:
        total = rng.randint(0, spare)
        jumps = rng.randint(1, 8)
        ends = sorted(rng.randint(0, total) for _ in range(jumps))
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            gaps[rng.choice(text.borders)] += end - start
    positions, at = [], 0
    for i in range(len(text.ids)):
        at += gaps[i]
        positions.append(at + i)
    return positions
