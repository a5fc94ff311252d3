"""Makes engine configurations from command lines, each in a forked process.

``python -m tests.engine.starting FOLDER SCENARIOS``: vLLM is imported once; then each
scenario, a dict of ``version`` (what the metadata in a folder say, or None),
``options``, ``env`` and ``before`` (code), runs by itself. Prints a list of [status,
output].
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.model_executor.models import registry
from vllm.utils.argparse_utils import FlexibleArgumentParser

PRELOADED = (
    "vllm.entrypoints.openai.responses.serving",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.async_llm",
)
"""What each start would import by itself."""


def start(folder: Path, scenario: dict[str, Any]) -> None:
    """What ``vllm serve`` does before there is an engine."""
    version = scenario["version"]
    info = folder / version / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )
    sys.path.insert(0, str(info.parent))
    os.environ.update(scenario["env"])
    exec(scenario["before"], {"EngineArgs": EngineArgs})
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(scenario["options"])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    print("worker", config.parallel_config.worker_cls)
    print("fields", "kv_budget" in CompletionRequest.model_fields)


def main() -> None:
    folder = Path(sys.argv[1])
    for name in PRELOADED:
        importlib.import_module(name)
    registry._run_in_subprocess = lambda function: function()
    answers = []
    for number, scenario in enumerate(json.loads(sys.argv[2])):
        log = folder / f"{number}.txt"
        child = os.fork()
        if child == 0:
            with log.open("w") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
                try:
                    start(folder, scenario)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                sys.stdout.flush()
                os._exit(0)
        answers.append([os.waitpid(child, 0)[1], log.read_text()])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
