"""`python -m tests.soak --minutes 30`: exits with 1 if an answer or a block is lost."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Random requests over the schedulers, then mixed load on an engine."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of load")
    parser.add_argument("--items", type=int, default=90, help="prompts to choose from")
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument(
        "--no-states",
        action="store_true",
        help="leave out the random requests over the schedulers (tests/stateful)",
    )
    args = parser.parse_args()
    states = 0
    if not args.no_states:
        print("Random requests over vLLM's schedulers:", flush=True)
        command = (*("-m", "pytest", "-q", "tests/stateful"),)
        states = subprocess.run(
            [sys.executable, *command, "--hypothesis-profile=soak"], check=False
        ).returncode
    # As tests/conftest.py has it: before vLLM is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from asl_vllm_testing.harness import engine
    from asl_vllm_testing.random_model import RANDOM_SHAPE, write_random_model
    from tests.soak.items import catalogue
    from tests.soak.load import ENGINE, Soak

    # Each injected error would be logged with its traceback.
    logging.getLogger("asl_vllm.prefill.queue").setLevel(logging.CRITICAL)
    seed = int(time.time()) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", **RANDOM_SHAPE)
        items = catalogue(model, args.items)
        with engine(model, **ENGINE) as host:
            report = Soak(host, items, seed).run(args.minutes * 60)
    print(f"seed    {seed}\n{report}")
    return 0 if report.ok and not states else 1


if __name__ == "__main__":
    sys.exit(main())
