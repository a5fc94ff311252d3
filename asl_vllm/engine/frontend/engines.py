"""The state of every engine behind a front end, asked by name."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from asl_vllm.engine.messages import STATE_METHOD


class EngineGoneError(GracefulHTTPError):
    """No answer from an engine: it died, is too slow, or is not there. Status 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


async def engine_states(
    client: EngineClient | None, timeout: float
) -> list[dict[str, Any]]:
    """The state of every engine that a front end manages, by index.

    Raises:
        EngineGoneError: an engine is dead, or gave no answer within ``timeout``
            seconds. Engines answer between two steps.
    """
    core: Any = getattr(client, "engine_core", None)
    if core is None:
        raise EngineGoneError("this server has no engine")
    try:
        states: list[dict[str, Any]] = await asyncio.wait_for(
            core.call_utility_all_async(STATE_METHOD), timeout
        )
    except TimeoutError:
        raise EngineGoneError(f"no answer from the engine in {timeout:g} s") from None
    except EngineDeadError:
        raise EngineGoneError("the engine is dead") from None
    return sorted(states, key=lambda state: int(state["index"]))
