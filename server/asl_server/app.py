"""What asl_vllm adds to vLLM's HTTP application when a policy is on."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from asl_server import page, routes
from asl_server.middleware import KVUsageMiddleware
from asl_vllm.engine.frontend import repeated_ids, streams, usage

ROUTERS = (routes.router, page.router)
"""Routers that are added to vLLM's own."""


class KVEndpoints:
    """Our routes, headers and reply fields, as vLLM's `EndpointPlugin`."""

    name = "asl_vllm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes and the middleware to an application under construction."""
        usage.install()
        repeated_ids.install()
        streams.install()
        # vLLM adds its own after this, so API keys are checked further out.
        app.add_middleware(KVUsageMiddleware)
        for router in ROUTERS:
            app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The routes ask the engine client that vLLM keeps in the state."""
        parallel = engine_client.vllm_config.parallel_config
        repeated_ids.share(parallel._api_process_count)
