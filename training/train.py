"""Trains the model from scratch: ``python -m training.train --output DIR``.

Writes DIR/log.jsonl, DIR/checkpoint.pt every few minutes, from which an interrupted
run goes on, and at the end the model itself, as transformers reads it.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import Batch, make_batch
from training.export import save
from training.model import Decoder, ModelConfig
from training.muon import Muon

WARMUP_STEPS = 50
MUON_LR = 0.006
ADAM_LR = 0.004
WEIGHT_DECAY = 0.05
LOG_EVERY = 25
CHECKPOINT_S = 180.0
PROGRESS = ("step", "number", "stage_step", "tokens", "seconds")


@dataclass(frozen=True)
class Stage:
    """Steps of one difficulty.

    Each step has texts of one of `lengths`, `tokens` of them together, and applies
    the shared layer a number of times drawn from `loops`. weights are those of
    copy, needle, key_value and hops; share is the part of a text that questions take.
    The stage ends early once every task's exact match over LOG_EVERY steps is `until`.
    The learning rates' factor goes evenly from lr[0] to lr[1].
    """

    steps: int
    lengths: tuple[int, ...]
    loops: tuple[int, ...]
    most_hops: int
    weights: tuple[float, float, float, float] = (0.0, 0.15, 0.3, 0.55)
    share: tuple[float, float] = (0.2, 0.5)
    tokens: int = 2048
    until: float | None = None
    lr: tuple[float, float] = (1.0, 1.0)


STAGES = (
    Stage(300, (64,), (2,), 1, (0.3, 0.15, 0.25, 0.3), (0.4, 0.6), until=0.9),
    Stage(120, (64, 128), (3, 4), 2, share=(0.3, 0.5), until=0.9),
    Stage(120, (64, 128), (4, 5), 3, share=(0.3, 0.5), until=0.9),
    Stage(200, (64, 128, 256), (5, 6, 7), 4, share=(0.3, 0.5), until=0.9),
    Stage(250, (128, 256, 512), (6, 8, 10, 13), 4, lr=(1.0, 1 / 6)),
    Stage(
        200,
        (128, 256, 512, 1024),
        (6, 8, 10, 13),
        4,
        weights=(0.0, 0.1, 0.35, 0.55),
        tokens=4096,
        lr=(0.6, 0.4),
    ),
    Stage(
        260,
        (512, 1024, 2048, 4096),
        (7, 9, 13),
        4,
        weights=(0.0, 0.15, 0.45, 0.4),
        share=(0.1, 0.5),
        tokens=4096,
        lr=(0.4, 0.4),
    ),
    Stage(
        300,
        (256, 1024, 2048, 4096, 4096),
        (8, 11, 13),
        4,
        weights=(0.0, 0.15, 0.45, 0.4),
        share=(0.1, 0.5),
        tokens=4096,
        lr=(0.4, 0.0),
    ),
    Stage(
        100,
        (1024, 2048, 4096, 4096),
        (9, 11, 13),
        4,
        weights=(0.0, 0.2, 0.5, 0.3),
        share=(0.05, 0.4),
        tokens=8192,
        lr=(0.25, 0.0),
    ),
)


class Trainer:
    """The model, its optimizers and how far the run has come."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        seed: int,
        output: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.stages, self.seed, self.output = stages, seed, output
        self.device = torch.device(device)
        # Made on the CPU, so that a seed gives the same weights on every device.
        self.model = Decoder(ModelConfig()).to(self.device)
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            (matrices if "_proj." in name else others).append(parameter)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, MUON_LR, weight_decay=WEIGHT_DECAY), MUON_LR),
            (torch.optim.Adam(others, ADAM_LR, betas=(0.9, 0.95)), ADAM_LR),
        ]
        self.step = 0
        self.number = 0  # of the stage
        self.stage_step = 0  # within the stage
        self.tokens = 0
        self.seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last stage is done."""
        return self.number == len(self.stages)

    def lr_factor(self) -> float:
        """Rises over WARMUP_STEPS, from then on as the stages say."""
        stage = self.stages[self.number]
        start, end = stage.lr
        factor = start + (end - start) * self.stage_step / stage.steps
        return min((self.step + 1) / WARMUP_STEPS, factor)

    def train_step(self) -> tuple[float, dict[str, list[float]]]:
        """One update; its loss and, by task, whether each answer was right."""
        rng = random.Random(f"{self.seed} {self.step}")
        stage = self.stages[self.number]
        length, loops = rng.choice(stage.lengths), rng.choice(stage.loops)
        config = self.model.config
        batch = make_batch(
            rng,
            max(1, stage.tokens // length),
            length,
            stage.weights,
            stage.most_hops,
            stage.share,
            config.max_positions,
        ).to(self.device)
        hidden = self.model(batch.ids, batch.positions, loops)
        asked = batch.labels >= 0
        logits = self.model.logits(hidden[asked])
        loss = F.cross_entropy(logits, batch.labels[asked])
        loss.backward()  # type: ignore[no-untyped-call]
        factor = self.lr_factor()
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.stage_step += 1
        self.tokens += batch.ids.numel()
        return loss.item(), right_answers(batch, logits, asked)

    def save_checkpoint(self) -> None:
        """Replaces the checkpoint at once, so that none is ever half written."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        state = progress | {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o, _ in self.optimizers],
        }
        partial = self.output / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.output / "checkpoint.pt")

    def load_checkpoint(self) -> None:
        """Goes on where the output folder's checkpoint is, if there is one."""
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(
            path, weights_only=True, map_location=self.device
        )
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(
            self.optimizers, state["optimizers"], strict=True
        ):
            optimizer.load_state_dict(saved)
        for name in PROGRESS:
            setattr(self, name, state[name])

    def run(self, stop_step: int | None = None) -> None:
        """Steps to the end, or up to stop_step, a multiple of LOG_EVERY."""
        started = time.monotonic() - self.seconds
        saved = time.monotonic()
        losses: list[float] = []
        right: dict[str, list[float]] = defaultdict(list)
        while not self.finished and self.step != stop_step:
            stage = self.stages[self.number]
            loss, answers = self.train_step()
            self.seconds = time.monotonic() - started
            losses.append(loss)
            for task, hits in answers.items():
                right[task] += hits
            ended = self.stage_step == stage.steps
            if self.step % LOG_EVERY and not ended:
                continue
            exact = {task: mean(right[task]) for task in sorted(right)}
            self.log(mean(losses), exact)
            if ended or (stage.until is not None and min(exact.values()) > stage.until):
                self.number, self.stage_step = self.number + 1, 0
            losses, right = [], defaultdict(list)
            if not self.stage_step or time.monotonic() - saved > CHECKPOINT_S:
                self.save_checkpoint()
                saved = time.monotonic()
        self.save_checkpoint()

    def log(self, loss: float, exact: dict[str, float]) -> None:
        """One line to the log and to stdout, of the steps since the last one."""
        line = {
            "step": self.step,
            "stage": self.number,
            "tokens": self.tokens,
            "seconds": round(self.seconds),
            "loss": round(loss, 4),
            "exact": {task: round(share, 3) for task, share in exact.items()},
        }
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
            print(json.dumps(line), file=log)
        print(json.dumps(line), flush=True)


def right_answers(
    batch: Batch, logits: Tensor, asked: Tensor
) -> dict[str, list[float]]:
    """By task, 1.0 for each answer all of whose tokens were predicted, else 0.0.

    logits are those of the places in `asked` [B, T], in order.
    """
    wrong = logits.argmax(-1) != batch.labels[asked]
    number = batch.question[asked]
    missed = torch.zeros(len(batch.tasks), dtype=torch.bool, device=wrong.device)
    missed[number[wrong & (number >= 0)]] = True
    right: dict[str, list[float]] = defaultdict(list)
    for task, miss in zip(batch.tasks, missed.tolist(), strict=True):
        right[task].append(float(not miss))
    return right


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(STAGES, args.seed, args.output, args.device)
    trainer.load_checkpoint()
    trainer.run()
    save(trainer.model, args.output / "model")


if __name__ == "__main__":
    main()
