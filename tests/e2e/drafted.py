"""N-gram speculation beside a budget: ``python -m tests.e2e.drafted``.

Prints as JSON the tokens of one pruned prompt, how many tokens were drafted, and the
steps that it took to generate.
"""

from __future__ import annotations

import json
from typing import Any

from asl_vllm_testing.harness import add, assert_pool_whole, drain, engine, step
from asl_vllm_testing.oracle.tasks import needle

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def main() -> None:
    """Serves the prompt and prints what came of it."""
    drafted = []
    with engine(policy={"policy": "asl", **RULE}, speculative_config=NGRAM) as host:
        schedule = host.scheduler.schedule

        def scheduling(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            drafts = output.scheduled_spec_decode_tokens.values()
            drafted.append(sum(map(len, drafts)))
            return output

        host.scheduler.schedule = scheduling
        ids = needle(1, 600).token_ids
        request = add(host, "drafted", ids, budget=128, max_tokens=60)
        steps = 0
        while not request.finished:
            step(host, request)
            steps += request.num_generated > 0
        drain(host)
        assert_pool_whole(host)
    seen = {"tokens": request.tokens, "drafted": sum(drafted), "steps": steps}
    print("\n" + json.dumps(seen))


if __name__ == "__main__":
    main()
