"""A load of requests, driven through an engine step by step, and what it showed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request. It is sent once all asks before it have ``after_tokens`` tokens."""

    prompt: Sequence[int]
    max_tokens: int = 1
    budget: int | None = None
    after_tokens: int = 0
    policy: str | None = None
    """Of the engine's policies; None: its own."""
    reuse: str | None = None
    """Whether a pruned prompt reads the prefix cache (`kv_reuse`)."""
    samples: int = 1
    """Answers; several are sampled."""


@dataclass
class Answer:
    """When a request was sent and when its tokens came, in seconds; its report."""

    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    report: dict[str, Any] | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.sent

    def gaps(self, begin: float, end: float) -> list[float]:
        """Times between tokens, of those that came in ``[begin, end]``."""
        pairs = zip(self.token_times, self.token_times[1:], strict=False)
        return [late - early for early, late in pairs if begin <= late <= end]


@dataclass
class Trace:
    """What a load did: its answers, and the pool's and the scheduler's peaks."""

    answers: list[Answer]
    seconds: float
    peak_running: int
    """Requests that were in the decoding batch at once."""
    peak_blocks: int
    """KV blocks that were held at once."""


def drive(llm: Any, asks: Sequence[Ask]) -> Trace:
    """Runs ``asks`` on an in-process engine, whose requests it owns until they end."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    answers = [Answer() for _ in asks]
    peak_running = peak_blocks = sent = 0
    began = time.perf_counter()
    while sent < len(asks) or engine.has_unfinished_requests():
        while sent < len(asks) and all(
            len(answer.token_times) >= asks[sent].after_tokens
            for answer in answers[:sent]
        ):
            answers[sent].sent = time.perf_counter()
            _send(engine, str(sent), asks[sent])
            sent += 1
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            answer = answers[int(output.request_id)]
            new = sum(len(part.token_ids) for part in output.outputs)
            answer.token_times += [now] * new
            if output.finished:
                answer.report = output.kv_transfer_params
                answer.cached_tokens = output.num_cached_tokens or 0
        decoding = [r for r in scheduler.running if r.num_output_tokens]
        peak_running = max(peak_running, len(decoding))
        peak_blocks = max(peak_blocks, free - pool.get_num_free_blocks())
    return Trace(answers, time.perf_counter() - began, peak_running, peak_blocks)


def _send(engine: Any, request_id: str, ask: Ask) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ours = {"kv_budget": ask.budget, "kv_policy": ask.policy, "kv_reuse": ask.reuse}
    params = SamplingParams(
        n=ask.samples,
        temperature=0 if ask.samples == 1 else 1,
        seed=0,
        max_tokens=ask.max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args={k: v for k, v in ours.items() if v is not None} or None,
    )
    prompt = {"prompt_token_ids": list(ask.prompt)}
    engine.add_request(request_id, prompt, params)


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids of the random models; they look random and differ by seed."""
    return [(i * 7919 + seed * 104729 + 13) % 500 + 4 for i in range(num_tokens)]
