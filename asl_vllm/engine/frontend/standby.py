"""What is left of asl_vllm beside a vLLM that it does not fit: it refuses policies.

Touch points: wraps ``EngineArgs.add_cli_args``, as `cli` does, so that the options are
known; and ``EngineArgs.create_engine_config``, which refuses them. Where even these do
not fit, vLLM itself says that it does not know the options.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from asl_vllm.config import AslConfig
from asl_vllm.engine.patching import UpstreamDriftError, together, wrap_method

logger = logging.getLogger(__name__)


def refusal(config: AslConfig, reason: str) -> UpstreamDriftError:
    """The error that says why a policy cannot be on beside this vLLM."""
    return UpstreamDriftError(
        f"--kv-policy {config.policy}: {reason} With --kv-policy none vLLM starts, and "
        "prunes nothing."
    )


def install(reason: str) -> None:
    """Has policies refused for ``reason``, and changes nothing else; idempotent."""
    try:
        _install(reason)
    except UpstreamDriftError as drift:
        logger.warning("%s asl_vllm does nothing here (%s).", reason, drift)


@together()
def _install(reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from asl_vllm.engine.frontend import cli
    from asl_vllm.engine.settings import config_of_additional

    def wrap(original: Any) -> Any:
        def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
            config: AslConfig = config_of_additional(self.additional_config)
            if config.enabled:
                raise refusal(config, reason)
            return original(self, *args, **kwargs)

        return create_engine_config

    def declare(parser: argparse.ArgumentParser) -> None:
        ours = argparse.ArgumentParser(add_help=False)
        cli.add_options(ours)
        taken = ours._option_string_actions.keys() & parser._option_string_actions
        if taken:
            logger.warning("%s is vLLM's own option here. %s", min(taken), reason)
        else:
            cli.declare(parser)

    cli.install_options(declare)
    wrap_method(EngineArgs, "create_engine_config", ("self",), wrap)
