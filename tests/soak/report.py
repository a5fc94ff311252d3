"""The accounts of a soak run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What a run did and what went wrong; `ok` when nothing did."""

    asked: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    prefills: Counter[str] = field(default_factory=Counter)
    """How prompts that were pruned came to be so."""
    steps: int = 0
    preempted: int = 0
    leaked: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.leaked and self.ended["right"] > 0

    def __str__(self) -> str:
        def table(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))

        lines = [
            f"time    {self.seconds / 60:.1f} minutes, {self.steps} steps",
            f"load    {table(self.asked)}",
            f"pruned  {table(self.prefills)}",
            f"ended   {table(self.ended)}",
            f"faults  {table(self.faults)}; requests preempted {self.preempted}",
            f"wrong   {len(self.wrong)}",
            f"leaked  {self.leaked}",
            *self.wrong[:20],
        ]
        return "\n".join(lines)
