"""``usage.kv_cache`` in the lines that ``vllm run-batch`` writes.

It calls the endpoints' handlers without an HTTP application, so no middleware opens a
collector for each request.

Touch point: wraps ``run_request`` of vLLM's batch runner.
"""

from __future__ import annotations

import sys
from typing import Any

from asl_vllm.engine.frontend import usage
from asl_vllm.engine.patching import wrap_method

RUNNER, _, _RUN = "vllm.entrypoints.launchers.run_batch.run_request".rpartition(".")


def install() -> None:
    """Wraps the runner where it is the program that runs; idempotent.

    For processes whose engine has a policy.
    """
    runner = sys.modules.get(RUNNER)
    if runner is None:
        return
    usage.install()

    def wrap(original: Any) -> Any:
        async def run_request(*args: Any, **kwargs: Any) -> Any:
            with usage.collect():
                return await original(*args, **kwargs)

        return run_request

    wrap_method(runner, _RUN, ("serving_engine_func", "request"), wrap)
