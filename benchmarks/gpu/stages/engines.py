"""Engines on the shipped model answer as on a CPU, in every way to run them.

A row of `WAYS` is a stage. Each asks an engine the prompts of `benchmarks.gpu.expected`
without a budget; pruned, in one batch; pruned, every request preempted after its first
token; and pruned in a pool that is too small for all of them. Right is an answer whose
digits are the expected ones. bf16 may change later tokens, which are only counted, and
the layer of a selection by one. After each round every KV block must be free again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from benchmarks.gpu.expected import BLOCK, BUDGET, MAX_TOKENS, MODEL, RULE, load
from benchmarks.gpu.stage import Host, Row, Stage

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full graphs": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    },
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "compiled": {"compilation_config": {"mode": 3, "cudagraph_mode": "NONE"}},
    # Compiled, with full graphs for decoding and piecewise ones for the rest.
    "default": {},
}
GRAPHS = ("full graphs", "piecewise", "default")
SMALL_POOL = 640
"""Tokens; the pruned prompts and their answers take some 900."""
LAYERS_OFF = 1
"""How far a bf16 selection layer may be from the fp32 one."""


@dataclass(frozen=True)
class Way:
    """A way to run an engine."""

    runner: str
    backend: str
    mode: str
    options: dict[str, Any] = field(default_factory=dict)
    bands: int = 1
    dry: bool = False
    """Whether a CPU can stand in for the GPU."""

    @property
    def name(self) -> str:
        """The stage's name."""
        parts = ["engine", self.runner, self.backend.split("_")[0].lower(), self.mode]
        if self.options.get("async_scheduling") is False:
            parts.append("sync")
        parts += [self.options["dtype"]] if "dtype" in self.options else []
        parts += ["bands"] if self.bands > 1 else []
        return "-".join(parts).lower().replace(" ", "-").replace("_", "-")


FLASH, TRITON = "FLASH_ATTN", "TRITON_ATTN"
WAYS = (
    Way("v2", FLASH, "eager", dry=True),
    Way("v2", FLASH, "full graphs"),
    Way("v2", FLASH, "piecewise"),
    Way("v2", FLASH, "compiled"),
    Way("v2", FLASH, "default"),
    Way("v2", TRITON, "eager"),
    Way("v2", TRITON, "full graphs"),
    Way("v1", FLASH, "eager", dry=True),
    Way("v1", FLASH, "full graphs"),
    Way("v1", FLASH, "default"),
    Way("v1", TRITON, "full graphs"),
    Way("v2", FLASH, "full graphs", {"async_scheduling": False}),
    Way("v1", FLASH, "full graphs", {"async_scheduling": False}),
    Way("v2", TRITON, "eager", {"dtype": "float32"}),
    Way("v2", FLASH, "full graphs", bands=4),
)


class Replays:
    """Counts replays of CUDA graphs in this process."""

    def __init__(self) -> None:
        import torch

        self.count = 0
        stock = torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            self.count += 1
            stock(graph)

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]


def options_of(way: Way, host: Host) -> dict[str, Any]:
    """The engine's arguments."""
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": False,
        "attention_backend": way.backend,
        "gpu_memory_utilization": 0.05,
        # The same prompts are asked pruned and unpruned: each is computed.
        "policy": {"policy": "asl", "bands": way.bands, "reuse": "none", **RULE},
        "block_size": BLOCK,
        "max_num_batched_tokens": 512,
        **MODES[way.mode],
        **way.options,
    }
    if host.dry:
        options |= {"dtype": "float32", "gpu_memory_utilization": 0.9}
        del options["attention_backend"]
    return options


def ask(host: Any, prompts: Sequence[list[int]], name: str, **fields: Any) -> list[Any]:
    """Requests of several prompts, added and not yet run."""
    from asl_vllm_testing.harness import add

    return [
        add(host, f"{name}{i}", prompt, max_tokens=MAX_TOKENS, **fields)
        for i, prompt in enumerate(prompts)
    ]


def preempt_each(host: Any, requests: Sequence[Any]) -> int:
    """Runs the requests to their end, preempting each once; returns how many were."""
    from asl_vllm_testing.harness import step

    preempted: set[str] = set()
    for _ in range(3000):
        if all(request.finished for request in requests):
            break
        step(host, *requests)
        for victim in list(host.scheduler.running):
            if victim.num_output_tokens and victim.request_id not in preempted:
                preempted.add(victim.request_id)
                host.scheduler.running.remove(victim)
                host.scheduler._preempt_request(victim, 0.0)
    return len(preempted)


def count_preemptions(host: Any, requests: Sequence[Any]) -> int:
    """Runs the requests to their end; how many vLLM preempted."""
    from asl_vllm_testing.harness import step

    preempted: set[str] = set()
    for _ in range(3000):
        if all(request.finished for request in requests):
            break
        step(host, *requests)
        live = host.scheduler.requests.values()
        preempted |= {request.request_id for request in live if request.num_preemptions}
    return len(preempted)


def judge(what: str, requests: Sequence[Any], pruned: bool) -> Row:
    """Answers and choices against the expected ones."""
    right = layers = kept = same = 0
    for request, want in zip(requests, load(), strict=True):
        done = request.output is not None and request.finished
        got = list(request.output.outputs[0].token_ids) if done else []
        right += got[: len(want.answer)] == want.answer
        tokens = want.pruned if pruned else want.plain
        pairs = zip(got, tokens, strict=False)
        same += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if pruned and done:
            report = request.output.kv_transfer_params
            kept += report["kept_tokens"] == want.kept
            layers += near(report["selection_layer"], want.selection_layer)
    count = len(requests)
    row: Row = {"what": what, "answers": f"{right} of {count}"}
    row["tokens_as_expected"] = f"{same} of {count * MAX_TOKENS}"
    row["ok"] = right == count
    if pruned:
        row["selection_layers"] = f"{layers} of {count}"
        row["ok"] = row["ok"] and layers == kept == count
    return row


def both(running: Any, prompts: Sequence[list[int]]) -> Iterator[Row]:
    """The prompts unpruned and pruned, each time in one batch; a row each."""
    from asl_vllm_testing.harness import run_to_end

    plain = ask(running, prompts, "plain")
    run_to_end(running, *plain)
    yield judge("without a budget", plain, pruned=False)
    batch = ask(running, prompts, "batch", budget=BUDGET)
    run_to_end(running, *batch)
    yield judge("pruned, in one batch", batch, pruned=True)


def near(got: int | None, want: int | None) -> bool:
    """Whether two selections are of about the same layer; none is only none."""
    if got is None or want is None:
        return got is want
    return abs(got - want) <= LAYERS_OFF


def run_way(way: Way, host: Host) -> Iterator[Row]:
    """Yields a row a check."""
    if not way.dry:
        host.gpu_only("an attention backend or a mode that a CPU does not have")
    if host.dry and way.runner == "v2":
        # Its Triton kernels run in Triton's interpreter.
        import asl_vllm_testing.interpreted_v2  # noqa: F401

    from asl_vllm_testing.harness import assert_pool_whole, engine, run_to_end

    replays = Replays()
    prompts = [want.prompt for want in load()]
    options = options_of(way, host)
    with engine(MODEL, **options) as running:
        yield from what_runs(running, way, host)
        captured = replays.count
        yield from both(running, prompts)
        if way.bands > 1:
            full = ask(running, prompts, "full", budget=BUDGET, kv_shallow="full")
            run_to_end(running, *full)
            yield judge("every token in shallow layers", full, pruned=False)
        victims = ask(running, prompts, "victim", budget=BUDGET)
        preempted = preempt_each(running, victims)
        row = judge("pruned, each preempted", victims, pruned=True)
        row["preempted"] = preempted
        yield row | {"ok": row["ok"] and preempted == len(prompts)}
        if not host.dry:
            wanted = way.mode in GRAPHS
            count = replays.count - captured
            yield {
                "what": "graphs were replayed" if wanted else "no graph was replayed",
                "replays": count,
                "ok": (count > 0) == wanted,
            }
        yield pool_row(running, assert_pool_whole)
    # A block holds the layers of one band.
    with engine(MODEL, **options, pool_tokens=SMALL_POOL * way.bands) as running:
        crowd = ask(running, prompts, "crowd", budget=BUDGET)
        preempted = count_preemptions(running, crowd)
        row = judge("pruned, in a small pool", crowd, pruned=True)
        row["preempted"] = preempted
        yield row | {"ok": row["ok"] and preempted > 0}
        yield pool_row(running, assert_pool_whole)


def what_runs(running: Any, way: Way, host: Host) -> Iterator[Row]:
    """Whether the engine is the one that was meant."""
    from asl_vllm.engine.worker.attention import WRAPPED_BACKENDS

    (runner,) = running.llm.collective_rpc(lambda worker: type(worker.model_runner))
    modules = {kind.__module__ for kind in runner.mro()}
    is_v2 = "vllm.v1.worker.gpu.model_runner" in modules
    yield {"what": "model runner", "got": runner.__module__}
    yield {"what": f"is {way.runner}", "ok": is_v2 == (way.runner == "v2")}
    backend = running.factory.model._attentions[0].attn_backend.stock.__name__
    config = running.scheduler.vllm_config.scheduler_config
    asked = way.options.get("async_scheduling", True) and not host.dry
    wanted = "CPU_ATTN" if host.dry else way.backend
    right = WRAPPED_BACKENDS[wanted].endswith("." + backend)
    yield {"what": "attention backend", "got": backend, "ok": right}
    yield {
        "what": "asynchronous scheduling",
        "got": str(config.async_scheduling),
        "ok": config.async_scheduling == asked,
    }


def pool_row(running: Any, check: Any) -> Row:
    """Whether every block is free again, once."""
    from asl_vllm.engine.scheduler.integrity import IntegrityError
    from asl_vllm_testing.harness import drain

    drain(running)
    try:
        check(running)
        running.check()
    except (AssertionError, IntegrityError) as error:
        return {"what": "no block leaked", "got": repr(error), "ok": False}
    return {"what": "no block leaked", "ok": True}


def stage_of(way: Way) -> Stage:
    """A way's stage."""
    backend = way.backend.split("_")[0].title()
    extra = "".join(f", {k} {v}" for k, v in way.options.items())
    extra += f", {way.bands} bands" if way.bands > 1 else ""
    return Stage(
        name=way.name,
        what=f"Answers, runner {way.runner}, {backend}Attention, {way.mode}{extra}",
        seconds=180 if way.mode in ("piecewise", "compiled", "default") else 120,
        run=lambda host: run_way(way, host),
        env=(("VLLM_USE_V2_MODEL_RUNNER", "1" if way.runner == "v2" else "0"),),
    )


STAGES = tuple(stage_of(way) for way in WAYS)
