"""Made-up records of an accuracy run."""

from __future__ import annotations

from typing import Any


def record(policy: str, budget: int | None, index: int, **changes: Any) -> Any:
    return {
        "task": "needle",
        "length": 512,
        "index": index,
        "policy": policy,
        "budget": budget,
        "score": 1.0,
        "prompt_tokens": 500,
        "kept_tokens": budget or 500,
        "selection_layer": None,
        "token_layers": 5000,
        "num_layers": 10,
        **changes,
    }


RECORDS = [
    record("fastkv@10", 64, 0, selection_layer=10),
    record("fastkv@3", 64, 0, selection_layer=3),
    *(
        record("asl", 64, i, selection_layer=layer, score=score, token_layers=work)
        for i, (layer, score, work) in enumerate(
            [(4, 1.0, 2000), (6, 0.5, 3000), (4, 0.0, 2000), (None, 1.0, 5000)]
        )
    ),
    record("random", 64, 0, token_layers=640, score=0.0),
    record("full", None, 0),
    record("full", None, 0, task="key_value"),
]
