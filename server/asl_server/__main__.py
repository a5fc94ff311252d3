"""``python -m asl_server MODEL ...`` is ``vllm serve MODEL ...``.

Both load asl_vllm through vLLM's plugin entry point and give the same API; this one
refuses to start when the entry point is not there.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    """Runs ``vllm serve`` with this process's arguments."""
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "asl_vllm" not in plugins.names:
        sys.exit(
            "asl_server: vLLM would not load asl_vllm, whose entry point is not "
            "installed; run `pip install` on the package first."
        )
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    vllm_main()


if __name__ == "__main__":
    main()
