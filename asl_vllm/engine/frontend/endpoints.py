"""Adding routes to vLLM's HTTP server when a policy is on.

vLLM has an interface for this, `EndpointPlugin`, which loads only plugins that the
variable ``VLLM_PLUGINS`` names. ``--kv-policy`` is the consent here, so the plugin is
added to those. It is named, not imported: the server lies above the engine.

Touch point: wraps ``vllm.plugins.load_endpoint_plugins``.
"""

from __future__ import annotations

from typing import Any

from vllm import plugins
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from asl_vllm.engine.frontend import apis
from asl_vllm.engine.frontend.served import pruning
from asl_vllm.engine.patching import wrap_method

PLUGIN = "asl_server.app.KVEndpoints"
"""The plugin that is added; its module is imported by servers with a policy only."""


def install() -> None:
    """Adds our plugin to each server that is built with a policy on; idempotent."""

    def wrap(original: Any) -> Any:
        def load_endpoint_plugins(supported_tasks: Any = None) -> list[EndpointPlugin]:
            # Where an application is built, vLLM has imported all endpoints by now.
            apis.install()
            found: list[EndpointPlugin] = original(supported_tasks)
            if pruning():
                found.append(resolve_obj_by_qualname(PLUGIN)())
            return found

        return load_endpoint_plugins

    wrap_method(plugins, "load_endpoint_plugins", ("supported_tasks",), wrap)
