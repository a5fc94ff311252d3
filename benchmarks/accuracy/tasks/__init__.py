"""The tasks by name. None needs a download."""

from __future__ import annotations

from benchmarks.accuracy.tasks import (
    explain,
    infinitebench_kv_retrieval,
    infinitebench_number_string,
    infinitebench_passkey,
    quote,
    ruler_cwe,
    ruler_fwe,
    ruler_niah,
    ruler_vt,
    small_models,
)
from benchmarks.accuracy.tasks.base import Room, Sample, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *ruler_niah.TASKS,
        ruler_vt.TASK,
        ruler_cwe.TASK,
        ruler_fwe.TASK,
        infinitebench_passkey.TASK,
        infinitebench_number_string.TASK,
        infinitebench_kv_retrieval.TASK,
        quote.TASK,
        explain.TASK,
        *small_models.TASKS,
    )
}

GROUPS = {
    group: [name for name, task in TASKS.items() if task.source == source]
    for group, source in {
        "ruler": "RULER",
        "infinitebench": "InfiniteBench",
        "text": "natural text",
        "small": "this project",
    }.items()
}
"""Names of all tasks of a kind."""

__all__ = ["GROUPS", "TASKS", "Room", "Sample", "Task"]
