"""Model runner V2 on a CPU: its Triton kernels run in Triton's interpreter.

Run as a process of its own, ``python -m asl_vllm_testing.interpreted_v2``, since vLLM
asks once whether there is Triton for the device. Prints a JSON list of [tokens,
report]: a prompt without a budget, then three in one batch for each of the modes of
shallow layers.
"""

from __future__ import annotations

import json
import os
import types

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import triton.backends

# The CPU build looks for Triton's CPU backend; interpreted kernels need none.
triton.backends.backends["cpu"] = types.SimpleNamespace(  # type: ignore[assignment]
    driver=types.SimpleNamespace(is_active=lambda: True)
)

from asl_vllm_testing.harness import add, assert_pool_whole, engine, run_to_end  # noqa: E402
from asl_vllm_testing.oracle.tasks import key_value, needle  # noqa: E402

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
BANDS = 5
BUDGET = 128
MAX_TOKENS = 6
PROMPTS = [
    needle(1, 600).token_ids,
    key_value(2, 333).token_ids,
    needle(3, 450).token_ids,
]


def main() -> None:
    """Serves the prompts and prints what came of them."""
    policy = {"policy": "asl", "bands": BANDS, **RULE}
    with engine(policy=policy, max_num_batched_tokens=512) as host:
        (runner,) = host.llm.collective_rpc(lambda worker: type(worker.model_runner))
        assert "vllm.v1.worker.gpu.model_runner" in {c.__module__ for c in runner.mro()}
        plain = add(host, "plain", PROMPTS[0], max_tokens=MAX_TOKENS)
        run_to_end(host, plain)
        done = [plain]
        for shallow in ("snapkv", "full"):
            batch = [
                add(
                    host,
                    f"{shallow}{index}",
                    ids,
                    budget=BUDGET,
                    max_tokens=MAX_TOKENS,
                    kv_shallow=shallow,
                )
                for index, ids in enumerate(PROMPTS)
            ]
            run_to_end(host, *batch)
            done += batch
        assert_pool_whole(host)
        results = [[r.tokens, r.output.kv_transfer_params] for r in done]
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
