"""Fidelity: the arithmetic against a plain one; both ways to measure it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, _load_logitsprocs_by_fqcns

from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.oracle.model import TinyDecoder
from benchmarks.accuracy.__main__ import main, replies_path
from benchmarks.accuracy.controls import shortened
from benchmarks.accuracy.fidelity import of_logits, of_top
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.shared_layers import FusedDecoder, SharedLayers
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tokens import HubTokenizer
from tests.accuracy.fakes import FakeServer, completion, fake_server

MODEL = str(TINY_MODEL)


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) * 2


def top(logits: torch.Tensor, count: int) -> list[dict[int, float]]:
    best = logits.log_softmax(-1).topk(count)
    return [
        dict(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def test_divergence_and_agreement_are_those_of_their_definitions() -> None:
    p, q = random_logits(0).double(), random_logits(1).double()
    found = of_logits(p, q)
    by_hand, same = 0.0, 0
    for ours, theirs in zip(p, q, strict=True):
        a, b = ours.exp() / ours.exp().sum(), theirs.exp() / theirs.exp().sum()
        by_hand += sum(float(x) * math.log(x / y) for x, y in zip(a, b, strict=True))
        same += int(ours.argmax() == theirs.argmax())
    assert found.kl == pytest.approx(by_hand / 6)
    assert found.agreement == same / 6
    assert of_logits(p, p).kl == pytest.approx(0) and of_logits(p, p).agreement == 1
    assert of_logits(q, p).kl != pytest.approx(found.kl)


def test_of_the_likeliest_tokens_it_is_at_most_the_true_one() -> None:
    p, q = random_logits(2).double(), random_logits(3).double()
    true = of_logits(p, q)
    assert of_top(top(p, 9), top(q, 9)).kl == pytest.approx(true.kl)
    found = [of_top(top(p, n), top(q, n)) for n in (1, 2, 4, 6)]
    assert all(0 <= one.kl <= true.kl + 1e-9 for one in found)
    assert {one.agreement for one in found} == {true.agreement}
    assert of_top(top(p, 4), top(p, 4)).kl == pytest.approx(0)


def rows(output: Path) -> dict[str, dict[str, Any]]:
    lines = replies_path(output).read_text().splitlines()[1:]
    return {row["policy"]: row for row in map(json.loads, lines)}


@pytest.mark.usefixtures("forked")
def test_without_a_server(tmp_path: Path) -> None:
    """What a control predicts, against one forward pass of the oracle."""
    output, page = tmp_path / "out.json", tmp_path / "page.md"
    arguments = [
        *("--direct", MODEL, "--policies", "full,asl,snapkv,recency"),
        *("--policy-config", '{"window": 8}', "--tasks", "explain", "--n", "1"),
        *("--lengths", "400", "--budgets", "1/4", "--concurrency", "1"),
        *("--output", str(output), "--page", str(page)),
    ]
    assert main(arguments) == 0
    found = rows(output)
    assert found["full"]["score"] == 1 and found["full"]["kl"] == pytest.approx(0)
    assert found["asl"]["kl"] > 0 and found["snapkv"]["kl"] > 0

    tokenizer = HubTokenizer(MODEL, "none")
    maker = PromptMaker(tokenizer, split="test", seed=0)
    ids = maker.prompt(TASKS["explain"], 400, 0).token_ids
    short = shortened("recency", ids, kept=found["recency"]["kept_tokens"],
                      window=8, bos=tokenizer.bos, seed="")  # fmt: skip
    layers = SharedLayers(FusedDecoder.load(MODEL))
    layers.begin_prompt(ids)
    size = TASKS["explain"].max_tokens
    (own,) = layers.answers([layers.unpruned_cache()], size, tokenizer.eos, ())
    if len(own) < size:
        own.append(tokenizer.eos)
    model = TinyDecoder.load(MODEL)
    p, q = (
        model.forward(torch.tensor([*prompt, *own]))[-len(own) - 1 : -1]
        for prompt in (ids, short)
    )
    assert p.argmax(-1).tolist() == own
    wanted = of_logits(p, q)
    assert found["recency"]["kl"] == pytest.approx(wanted.kl, rel=1e-3)
    assert found["recency"]["score"] == pytest.approx(wanted.agreement)
    assert "KL divergence" in page.read_text()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def speak(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Says 5 6 7, or what is forced; a pruned prompt is less sure of it."""
    tokens = body.get("vllm_xargs", {}).get("forced_tokens", [5, 6, 7])
    sure = 0.9 if body["kv_policy"] == "none" else 0.3
    usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"])}
    usage |= {"completion_tokens": len(tokens), "total_tokens": 0}
    if body["kv_policy"] != "none":
        usage["kv_cache"] = {"policy": body["kv_policy"], "selection_layer": 4}
        usage["kv_cache"] |= {"kept_tokens": 100, "skipped_token_layers": 0}
    told = {"policy": body["kv_policy"]} if body["kv_policy"] != "none" else None
    reply = completion("text", usage, told)
    assert body["return_tokens_as_token_ids"] and body["logprobs"] == 20
    reply["choices"][0]["logprobs"] = {
        "tokens": [f"token_id:{token}" for token in tokens],
        "token_logprobs": [math.log(sure)] * len(tokens),
        "text_offset": [0] * len(tokens),
        "top_logprobs": [
            {f"token_id:{token}": math.log(sure), "token_id:1": math.log(0.95 - sure)}
            for token in tokens
        ],
    }
    return 200, reply


ASK = [
    *("--tasks", "explain", "--lengths", "400", "--budgets", "1/4", "--n", "2"),
    *("--policies", "full,asl,recency"),
]


def test_with_a_server(server: FakeServer, tmp_path: Path) -> None:
    server.handle = speak
    output = tmp_path / "out.json"
    assert main(["--base-url", server.url, "--output", str(output), *ASK]) == 0
    # The unpruned answer is asked for once a prompt, and forced on the others.
    assert len(server.asked) == 6
    forced = [body for body in server.asked if "vllm_xargs" in body]
    assert [body["vllm_xargs"] for body in forced] == [{"forced_tokens": [5, 6, 7]}] * 4
    assert all(b["max_tokens"] == 3 and b["ignore_eos"] for b in forced)
    found = rows(output)
    by_hand = 0.9 * math.log(0.9 / 0.3) + 0.05 * math.log(0.05 / 0.65)
    assert found["asl"]["kl"] == pytest.approx(by_hand)
    assert found["asl"]["score"] == 0
    assert found["full"]["score"] == found["recency"]["score"] == 1
    assert found["full"]["kl"] == found["recency"]["kl"] == 0


def test_a_server_that_cannot_be_forced_is_told_how(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ignore(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        tokens = [8, 8, 8] if "vllm_xargs" in body else [5, 6, 7]
        return speak(body | {"vllm_xargs": {"forced_tokens": tokens}})

    server.handle = ignore
    output = str(tmp_path / "out.json")
    assert main(["--base-url", server.url, "--output", output, *ASK]) == 1
    said = capsys.readouterr().err
    assert "--logits-processors benchmarks.accuracy.forced:ForcedAnswer" in said


def test_the_servers_part_leaves_only_the_forced_token() -> None:
    """In a batch beside a request that forces nothing, through vLLM's own loader."""
    (found,) = _load_logitsprocs_by_fqcns(["benchmarks.accuracy.forced:ForcedAnswer"])
    part: Any = found(Mock(), torch.device("cpu"), False)
    assert not part.is_argmax_invariant()
    said: list[int] = []
    forcing = SamplingParams(extra_args={"forced_tokens": [3, 1]})
    added = [(0, SamplingParams(), [7], []), (1, forcing, [7], said)]
    part.update_state(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    free = torch.arange(5.0)
    for wanted in (3, 1, 4):
        logits = part.apply(free.repeat(2, 1))
        assert logits[0].tolist() == free.tolist()
        said.append(int(logits[1].argmax()))
        assert said[-1] == wanted
