"""Prompts that read the prefix cache, and samples that share a prefill, answer right.

An engine with vLLM's default compilation on the shipped model. Each prompt is asked
unpruned, which leaves it in the prefix cache, then pruned from scratch and over what is
cached, by every policy that reads; then in eight samples. Right are the expected digits
from each, the same number of kept tokens, and a selection layer beside that from
scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu.expected import BUDGET, MAX_TOKENS, MODEL, load
from benchmarks.gpu.stage import Host, Row, Stage
from benchmarks.gpu.stages.engines import FLASH, Way, near, options_of, pool_row

WAYS = (Way("v2", FLASH, "default"), Way("v1", FLASH, "full graphs"))
POLICIES = ("asl", "snapkv", "fastkv", "gemfilter", "pyramidinfer")
SAMPLES, COLD = 8, 0.01
"""Samples of a request, at a temperature that changes no digit."""


def run_way(way: Way, host: Host) -> Iterator[Row]:
    """Yields a row a policy, and one of the samples."""
    if host.dry:
        if way.runner == "v2":
            host.gpu_only("runner V2 with vLLM's default compilation")
        way = replace(way, mode="eager")
    from asl_vllm_testing.harness import assert_pool_whole, engine

    wanted = load()
    prompts = [want.prompt for want in wanted]
    with engine(MODEL, **options_of(way, host)) as running:
        for policy in POLICIES:
            asked = {"budget": BUDGET, "policy": policy, "max_tokens": MAX_TOKENS}
            running.llm.reset_prefix_cache()
            scratch = running.generate(prompts, reuse="none", **asked)
            running.generate(prompts, max_tokens=1)
            again = running.generate(prompts, reuse="read", **asked)
            yield judge(policy, wanted, scratch, again)
        (shared,) = running.generate(
            prompts[:1],
            reuse="read",
            budget=BUDGET,
            max_tokens=MAX_TOKENS,
            n=SAMPLES,
            temperature=COLD,
        )
        right = sum(starts(part, wanted[0].answer) for part in shared.outputs)
        yield {
            "what": f"{SAMPLES} samples of one prefill",
            "answers": f"{right} of {SAMPLES}",
            "ok": right == SAMPLES,
        }
        yield pool_row(running, assert_pool_whole)


def starts(part: Any, answer: list[int]) -> bool:
    """Whether a choice begins with the right digits."""
    return list(part.token_ids)[: len(answer)] == answer


def judge(policy: str, wanted: list[Any], scratch: Any, again: Any) -> Row:
    """Replies over a cached prefix beside those from scratch.

    What a policy cannot answer from scratch it need not answer over a prefix.
    """
    same = alike = right = alone = read = 0
    for want, first, second in zip(wanted, scratch, again, strict=True):
        one, two = first.kv_transfer_params, second.kv_transfer_params
        same += one["kept_tokens"] == two["kept_tokens"]
        alike += near(one["selection_layer"], two["selection_layer"])
        alone += starts(first.outputs[0], want.answer)
        right += starts(second.outputs[0], want.answer)
        read += (second.num_cached_tokens or 0) > 0
    count = len(wanted)
    return {
        "what": f"{policy} over a cached prefix",
        "answers": f"{right} of {count}",
        "from_scratch": f"{alone} of {count}",
        "read": f"{read} of {count}",
        "kept_as_from_scratch": f"{same} of {count}",
        "selection_layers": f"{alike} of {count}",
        "ok": same == alike == read == count and right >= alone,
    }


def stage_of(way: Way) -> Stage:
    """A way's stage."""
    return Stage(
        name=way.name.replace("engine", "reuse", 1),
        what=f"Answers over cached prefixes, runner {way.runner}, {way.mode}",
        seconds=180,
        run=lambda host: run_way(way, host),
        env=(("VLLM_USE_V2_MODEL_RUNNER", "1" if way.runner == "v2" else "0"),),
    )


STAGES = tuple(stage_of(way) for way in WAYS)
