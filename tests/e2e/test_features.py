"""vLLM's other features beside a budget, against the oracle or the right answers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from asl_vllm.prefill.hidden import HostHidden
from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing import ROOT, TINY_MODEL, warm
from asl_vllm_testing.harness import BLOCK, Engine, assert_pool_whole, drain, engine
from asl_vllm_testing.oracle.asl import OracleResult, generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import VOCABULARY, Prompt, key_value, needle

RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
BUDGET = 128


@pytest.fixture(scope="module")
def rich() -> Iterator[Engine]:
    """An engine with hidden states in host memory."""
    policy = {"policy": "asl", **RULE, "hidden_memory": "host"}
    with engine(
        policy={**policy, "max_prefill_tokens": 1024},
        max_num_batched_tokens=256,
    ) as started:
        yield started
        drain(started)
        assert_pool_whole(started)


@pytest.fixture(scope="module")
def model() -> TinyDecoder:
    return TinyDecoder.load(TINY_MODEL)


def expected(model: TinyDecoder, prompt: Prompt, max_tokens: int) -> OracleResult:
    ids = prompt.token_ids
    kept = resolve_kept(BUDGET, num_prompt_tokens=len(ids), block_size=BLOCK, window=8)
    return generate(model, ids, kept=kept, max_tokens=max_tokens, **RULE)


def test_ngram_speculation(model: TinyDecoder) -> None:
    """In a process of its own: vLLM starts no second engine beside llvmlite."""
    process = warm.run([sys.executable, "-m", "tests.e2e.drafted"], folder=ROOT)
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout.strip().splitlines()[-1])
    assert result["tokens"] == expected(model, needle(1, 600), 60).tokens
    assert result["drafted"] > 0
    assert result["steps"] < 60, "no drafted token was accepted"


def test_samples_of_one_request(rich: Engine, model: TinyDecoder) -> None:
    """Each is prefilled for itself; the likeliest token is the oracle's."""
    prompt = key_value(2, 500)
    params = SamplingParams(
        n=3,
        temperature=0.7,
        top_k=1,
        max_tokens=12,
        ignore_eos=True,
        extra_args={"kv_budget": BUDGET},
    )
    (output,) = rich.llm.generate(
        [{"prompt_token_ids": prompt.token_ids}], params, use_tqdm=False
    )
    want = expected(model, prompt, 12)
    assert [list(sample.token_ids) for sample in output.outputs] == [want.tokens] * 3
    assert output.kv_transfer_params["selection_layer"] == want.selection_layer


def test_logprobs(rich: Engine, model: TinyDecoder) -> None:
    prompt = needle(3, 400)
    (output,) = rich.generate(
        [prompt.token_ids], budget=BUDGET, max_tokens=6, logprobs=2, ignore_eos=True
    )
    want = expected(model, prompt, 6)
    completion = output.outputs[0]
    assert list(completion.token_ids) == want.tokens
    got = [
        entries[token].logprob
        for token, entries in zip(
            completion.token_ids, completion.logprobs, strict=True
        )
    ]
    # fp32 on both sides; the order of sums differs.
    assert got == pytest.approx(want.logprobs, abs=1e-3)


@pytest.mark.parametrize("right_first", [True, False])
def test_structured_output(rich: Engine, right_first: bool) -> None:
    """Of the allowed answers the model gives the right one, or else some other."""
    prompt = needle(4, 500)
    right = prompt.answer_words[0]
    wrong = ["blue", "pink"]
    choice = [right, *wrong] if right_first else wrong
    (output,) = rich.generate(
        [prompt.token_ids],
        budget=BUDGET,
        structured_outputs=StructuredOutputsParams(choice=choice),
    )
    # It may spell a word letter by letter.
    words = [VOCABULARY[token] for token in output.outputs[0].token_ids]
    answer = "".join(words).removesuffix("</s>")
    assert answer in choice
    assert (answer == right) == right_first
    assert output.kv_transfer_params["pruned_tokens"] > 0


def tensors(*owners: object) -> int:
    """Bytes of the tensors that the objects hold."""
    values = [value for owner in owners for value in vars(owner).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def test_the_start_up_line_says_what_is_held(rich: Engine) -> None:
    buffers = rich.factory.buffers
    assert isinstance(buffers.hidden, HostHidden)
    (line,) = rich.llm.collective_rpc("_memory_line")
    found = re.search(
        r"up to (\d+) tokens: .* GiB \((\d+) bytes a token\), outside the KV pool, and "
        r".* GiB \((\d+) bytes a token\) of host memory",
        line,
    )
    assert found, line
    capacity, device, host = map(int, found.groups())
    assert capacity == 1024
    pages = rich.factory.model._scratch._raw.nbytes
    held = tensors(buffers, buffers.hidden) + pages
    assert device + host == pytest.approx(held / capacity, abs=2)
    # 128 hidden values of 4 bytes; keys and values of 2 heads of 32, twice; and the
    # staging buffer's and the part of the queries of 25 windows: a prompt that passes
    # with others has at least 10 tokens of the chunk's 256.
    assert host == 512
    assert device == 1024 + 256 * 512 // 1024 + 25 * 8 * 512 // 1024
