"""Entry point of the ``vllm.general_plugins`` group.

vLLM calls `register` in every process it starts, possibly more than once. It adds
the command-line options and the request fields; everything that changes how the
engine works, or adds to replies, is installed only when a policy is on.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Hooks asl_vllm into vLLM; idempotent.

    Beside a vLLM that it does not fit it only refuses policies, so that a server
    without one starts as if asl_vllm were not installed.
    """
    from asl_vllm.engine import lines
    from asl_vllm.engine.patching import UpstreamDriftError, together

    try:
        untested = lines.check_installed()
        with together():
            from asl_vllm.engine.frontend import cli, endpoints, launch, request

            cli.install()
            launch.install()
            request.install()
            endpoints.install()
    except UpstreamDriftError as drift:
        from asl_vllm.engine.frontend import standby

        standby.install(str(drift))
        return
    if untested:
        logger.warning(untested)
