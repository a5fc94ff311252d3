"""``python -m benchmarks.peer MODEL``: kvpress and asl_vllm on the same prompts.

kvpress lives in an environment of its own, made on first use, since it needs an older
transformers. Both compute in float32 on all cores, one after the other; each request
keeps the same number of tokens per layer and answers as many. kvpress takes the
requests as one batch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from asl_vllm.selection import resolve_kept
from benchmarks import results_file
from benchmarks.accuracy.tasks import texts
from benchmarks.accuracy.tokens import HubTokenizer
from benchmarks.engines import ALLOCATOR, EngineProcess
from benchmarks.load import Ask
from benchmarks.report import markdown_table

TOKENS, BUDGET, MAX_TOKENS = 2640, 264, 64
WINDOW, POOL_KERNEL, BLOCK_SIZE = 32, 7, 32
KVPRESS = ("kvpress==0.5.5", "transformers<5.3")
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
SIDE = Path(__file__).with_name("with_kvpress.py")


def environment(folder: Path) -> Path:
    """The interpreter of kvpress's environment, which is made if it is not there."""
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        print(f"Installing {' and '.join(KVPRESS)} in {folder} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        install += [f"torch=={version('torch')}", *KVPRESS]
        # "+cpu" builds are published apart; pip may know another place already.
        if subprocess.run(install).returncode:
            subprocess.run([*install, "--extra-index-url", TORCH_CPU], check=True)
        done.touch()
    return python


def prompts(model: str, count: int) -> list[list[int]]:
    """Token ids of natural text, `TOKENS` each, no two alike."""
    tokenizer = HubTokenizer(model, "none")
    found = []
    for number in range(count):
        rng = random.Random(number)
        passages = texts.some(rng, TOKENS, tokenizer.count)
        # Tokens of passages put together may be fewer than those of each.
        ids = tokenizer.ids("\n\n".join([*passages, *passages[:4]]))
        assert len(ids) >= TOKENS
        found.append(ids[:TOKENS])
    return found


def row(name: str, singles: list[tuple[float, float]], together: float, n: int) -> Any:
    """Medians over rounds of one request, and the one round of ``n``."""
    return {
        "engine": name,
        "first_token_s": median(first for first, _ in singles),
        "more_tokens_s": median(more for _, more in singles),
        f"seconds_of_{n}": together,
        "answers_per_s": n / together,
    }


def of_kvpress(python: Path, order: dict[str, Any]) -> Any:
    """The row of kvpress."""
    done = subprocess.run(
        [python, SIDE],
        input=json.dumps(order),
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | ALLOCATOR,  # as engines have it
    )
    if done.returncode:
        sys.exit("kvpress failed; see above.")
    *singles, last = map(json.loads, done.stdout.splitlines())
    return row(
        "kvpress, SnapKVPress",
        [(one["first"], one["more"]) for one in singles],
        last["together"],
        len(order["prompts"]),
    )


def of_engine(order: dict[str, Any], policy: str) -> Any:
    """The row of a policy of ours."""
    ids, kept = order["prompts"], order["kept"]
    blocks = len(ids) * (-(-(kept + MAX_TOKENS + 1) // BLOCK_SIZE) + 1) + 2
    blocks = max(blocks, (TOKENS + MAX_TOKENS) // BLOCK_SIZE + 3)
    options = {
        "dtype": "float32",
        "max_model_len": TOKENS + 2 * MAX_TOKENS,
        "max_num_batched_tokens": 2 * TOKENS,
        "max_num_seqs": len(ids),
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": 1 << 30,
    }
    own = {"policy": policy, "window": WINDOW, "pool_kernel": POOL_KERNEL}
    asks = [Ask(one, 1 + MAX_TOKENS, BUDGET) for one in ids]
    with EngineProcess(policy, order["model"], options, own) as engine:
        engine.wait_until_ready()
        engine.run([Ask(ids[0][:512], 2, BUDGET)])
        singles, layer = [], None
        for _ in range(order["rounds"]):
            (answer,) = engine.run(asks[:1]).answers
            assert answer.report is not None
            assert answer.report["kept_tokens"] == kept
            layer = answer.report["selection_layer"]
            times = answer.token_times
            singles.append((answer.first_token_s, times[-1] - times[0]))
        together = engine.run(asks).seconds
    name = policy if layer is None else f"{policy}, layer {layer} of the first prompt"
    return row(name, singles, together, len(ids))


def main() -> None:
    """Measures both and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer")
    add = parser.add_argument
    add("model", help="folder of a Llama or Qwen3 model, as make weights makes one")
    add("--env", type=Path, required=True, help="folder of kvpress's environment")
    add("--requests", type=int, default=16, help="at once, beside one alone")
    add("--rounds", type=int, default=3, help="of one request alone")
    add("--policies", default="snapkv,asl", help="of asl_vllm")
    add("--output", type=Path, help="file for the results as JSON")
    args = parser.parse_args()
    python = environment(args.env)
    order = {
        "model": args.model,
        "prompts": prompts(args.model, args.requests),
        "kept": resolve_kept(
            BUDGET, num_prompt_tokens=TOKENS, block_size=BLOCK_SIZE, window=WINDOW
        ),
        "window": WINDOW,
        "pool_kernel": POOL_KERNEL,
        "max_tokens": MAX_TOKENS,
        "threads": os.cpu_count(),
        "rounds": args.rounds,
    }
    rows = [of_kvpress(python, order)]
    rows += [of_engine(order, policy) for policy in args.policies.split(",")]
    print(markdown_table(tuple(rows[0]), rows))
    if args.output:
        results_file.write(
            args.output,
            {
                "versions": {n: version(n) for n in ("torch", "vllm", "asl_vllm")},
                "kvpress": KVPRESS,
                "tokens": TOKENS,
                "kept": order["kept"],
                "more_tokens": MAX_TOKENS,
                "rounds": args.rounds,
                "date": datetime.date.today().isoformat(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
