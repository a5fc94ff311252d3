"""Collects each request's KV usage and shows it in the reply's headers."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asl_vllm.engine.frontend.usage import collect
from asl_vllm.engine.result import PromptResult

HEADERS = {
    "X-KV-Policy": "policy",
    "X-KV-Selection-Layer": "selection_layer",
    "X-KV-Kept-Tokens": "kept_tokens",
    "X-KV-Pruned-Tokens": "pruned_tokens",
    "X-KV-Reused-Tokens": "reused_tokens",
}
"""Header -> the part of a `PromptResult` that it shows, if it has one."""


class KVUsageMiddleware:
    """Opens a `RequestUsage` for each HTTP request; without a plan nothing is added.

    A streamed reply's headers leave before its prompt is prefilled, so it has none of
    ours; its last usage chunk has all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on; the reply's headers get ours."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with collect() as usage:

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    result = usage.result()
                    if result is not None and message["status"] == 200:
                        _add(message, result)
                await send(message)

            await self.app(scope, receive, send_with_headers)


def _add(message: Message, result: PromptResult) -> None:
    headers = MutableHeaders(scope=message)
    for header, name in HEADERS.items():
        value = getattr(result, name)
        if value is not None:
            headers[header] = str(value)
