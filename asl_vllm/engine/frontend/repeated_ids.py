"""Refusing a request whose id another one of this front end has right now.

With random suffixes, vLLM's default, ids never repeat. Without them
(``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION``) vLLM takes the second request for more
input of the first, and its engine ends with "duplicate request id". A client that
hangs up and asks again under the same id may be that fast.

Touch point: wraps ``AsyncLLM.add_request``.
"""

from __future__ import annotations

from typing import Any

import vllm.envs as envs

from asl_vllm.engine.frontend.admission import refuse
from asl_vllm.engine.patching import wrap_method


def install() -> None:
    """Wraps the touch point; idempotent. For front ends with a policy only."""
    from vllm.v1.engine.async_llm import AsyncLLM

    def wrap(original: Any) -> Any:
        async def add_request(
            self: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> Any:
            live = self.output_processor.external_req_ids
            if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION and request_id in live:
                raise refuse(
                    f"request id {request_id!r} is taken by a request that has not "
                    "ended. Send another X-Request-Id, or wait.",
                    request_id,
                    "request_id",
                )
            return await original(self, request_id, *args, **kwargs)

        return add_request

    wrap_method(AsyncLLM, "add_request", ("self", "request_id", "prompt"), wrap)
