"""Entry point of the ``vllm.general_plugins`` group.

vLLM calls `register` in every process it starts, possibly more than once. It adds
the command-line options and the request fields; everything that changes how the
engine works, or adds to replies, is installed only when a policy is on.
"""

from __future__ import annotations


def register() -> None:
    """Hooks asl_vllm into vLLM; idempotent.

    Raises:
        UpstreamDriftError: vLLM's version or a replaced signature does not fit.
    """
    from asl_vllm.engine.frontend import cli, endpoints, launch, request
    from asl_vllm.engine.patching import check_vllm_version

    check_vllm_version()
    cli.install()
    launch.install()
    request.install()
    endpoints.install()
