"""What came of a prompt is told with its first token, whatever ends the request later.

vLLM tells a front end what a connector reports with the last output. A request that
ends at a stop string has none: the front end finds the string and has the engine abort.

Here a step is over, so fills begin and end here, and what they sample is told nobody.

Touch point: wraps ``update_from_output`` of vLLM's `Scheduler`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from asl_vllm.engine.patching import wrap_method


def install() -> None:
    """Wraps the method; idempotent. Called where the engine core lives."""

    def wrap(original: Any) -> Any:
        def update_from_output(
            self: Scheduler, scheduler_output: Any, model_runner_output: Any
        ) -> Any:
            side = getattr(self.connector, "scheduler_side", None)
            if side is not None:
                side.stale_outputs.arrive(scheduler_output.num_scheduled_tokens)
            outputs = original(self, scheduler_output, model_runner_output)
            if side is not None:
                for of_client in outputs.values():
                    side.tell(of_client.outputs)
                    of_client.outputs = side.fills.for_clients(of_client.outputs)
                side.fills.on_told(self)
            return outputs

        return update_from_output

    wrap_method(
        Scheduler,
        "update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        wrap,
    )
