"""The oracle against transformers, the tokenizer, hand-made cases and the tasks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.golden import CASES, recording
from asl_vllm_testing.oracle import (
    OracleResult,
    TinyDecoder,
    generate,
    published,
    write_random_model,
)
from asl_vllm_testing.oracle.asl import (
    SelectionRule,
    descending,
    head_scores,
    rank_variance,
)
from asl_vllm_testing.oracle.asl import ranks as ranks_of
from asl_vllm_testing.oracle.tasks import TASKS, VOCABULARY, Prompt

ROOT = Path(__file__).resolve().parents[2]
RULE = {"window": 8, "pool_kernel": 7, "l_min": 2, "l_obs": 2, "tau": 0.5}
SMALL = {
    "layers": 6,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 96,
}


@pytest.fixture(scope="module")
def tiny() -> TinyDecoder:
    return TinyDecoder.load(TINY_MODEL)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    return TinyDecoder.load(
        write_random_model(tmp_path_factory.mktemp("model"), **SMALL)
    )


def random_ids(count: int, vocab: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(4, vocab, (count - 1,), generator=generator).tolist()]


def answer(model: TinyDecoder, prompt: Prompt, **kwargs) -> OracleResult:
    count = len(prompt.answer_ids)
    return generate(model, prompt.token_ids, max_tokens=count, **{**RULE, **kwargs})


# The forward pass


def assert_equals_transformers(model_dir: Path, num_tokens: int, vocab: int) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor(random_ids(num_tokens, vocab))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        actual = TinyDecoder.load(model_dir).forward(ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_trained_model_equals_transformers() -> None:
    assert_equals_transformers(TINY_MODEL, 300, 234)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 1), (4, 4)])
def test_random_model_equals_transformers(
    tmp_path: Path, arch: str, heads: int, kv_heads: int, tied: bool
) -> None:
    shape = {**SMALL, "heads": heads, "kv_heads": kv_heads, "layers": 3}
    model_dir = write_random_model(
        tmp_path, **shape, arch=arch, tie_word_embeddings=tied
    )
    assert_equals_transformers(model_dir, 300, 512)


def test_cached_steps_equal_the_whole_prompt(random_model: TinyDecoder) -> None:
    ids = random_ids(40, 512)
    run = generate(random_model, ids, kept=None, max_tokens=6, **RULE)
    logprobs = random_model.forward(torch.tensor(ids + run.tokens)).log_softmax(-1)
    assert logprobs.argmax(-1)[len(ids) - 1 : -1].tolist() == run.tokens
    chosen = logprobs[range(len(ids) - 1, len(ids) + 5), run.tokens]
    torch.testing.assert_close(torch.tensor(run.logprobs), chosen.detach())


# The rule


@pytest.mark.parametrize("number", CASES)
def test_rule_equals_the_published_implementation(number: int) -> None:
    case = recording(number)
    config = case["config"]
    window = config["window"]
    num_top = config["budget"] - window
    rule = SelectionRule(num_top, config["l_min"], config["l_obs"], config["tau"])
    selected = -1
    for layer, (q, k) in enumerate(zip(case["q"], case["k"], strict=True)):
        q_window, keys = torch.tensor(q).transpose(0, 1), torch.tensor(k)
        score = head_scores(q_window, keys.transpose(0, 1), config["kernel"])
        kept = descending(score)[:, :num_top].sort(-1).values
        np.testing.assert_array_equal(kept, case["kept"][layer][:, :-window])
        if rule.observe(score.sum(0)):
            selected = layer
            chosen = descending(score.sum(0))[:num_top].sort().values
            np.testing.assert_array_equal(chosen, case["selected"][:-window])
            break
    assert selected == case["selected_layer"]
    np.testing.assert_allclose(rule.ratios, case["ratios"], rtol=1e-5)
    for rank, expected in zip(rule.history, case["ranks"], strict=False):
        np.testing.assert_array_equal(rank, expected)


def test_ties_go_to_the_later_token() -> None:
    score = torch.tensor([1.0, 3.0, 1.0, 3.0, 0.0])
    assert descending(score).tolist() == [3, 1, 2, 0, 4]
    assert ranks_of(score).tolist() == [4, 2, 3, 1, 5]


def test_variance_over_the_union_of_tops() -> None:
    first, second = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 2, 1, 3])
    # Tops of one: tokens 0 and 2, with ranks (1, 4) and (3, 1).
    assert rank_variance([first, second], 1) == (1.5**2 + 1.0**2) / 2


def test_rule_compares_with_the_first_checked_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(200, generator=generator)
    rule = SelectionRule(20, l_min=1, l_obs=2, tau=0.3)
    noise = [torch.rand(200, generator=generator) for _ in range(4)]
    seen = [
        rule.observe(base + size * part)
        for size, part in zip([5, 5, 3, 0.01], noise, strict=True)
    ]
    assert seen == [False, False, False, False]  # the last is still beside noise
    assert rule.observe(base)
    assert len(rule.ratios) == 4
    assert rule.ratios[0] == 1


def test_rule_never_selects_on_a_variance_of_zero() -> None:
    rule = SelectionRule(2, l_min=0, l_obs=1, tau=0.3)
    assert not any(rule.observe(torch.rand(9)) for _ in range(3))
    assert all(math.isnan(ratio) for ratio in rule.ratios)


def test_scores_by_loops() -> None:
    """The definition with no vector arithmetic: GQA, causality, padding counted."""
    generator = torch.Generator().manual_seed(0)
    window, tokens, heads, kv_heads, dim, kernel = 3, 11, 4, 2, 8, 5
    q = torch.randn(window, heads, dim, generator=generator)
    k = torch.randn(tokens, kv_heads, dim, generator=generator)
    before = tokens - window
    expected = torch.zeros(kv_heads, before)
    for head in range(heads):
        column = [0.0] * before
        for row in range(window):
            seen = before + row + 1
            logits = [
                float(q[row, head] @ k[m, head // 2]) / math.sqrt(dim)
                for m in range(seen)
            ]
            total = sum(math.exp(x) for x in logits)
            for m in range(before):
                column[m] += math.exp(logits[m]) / total
        for m in range(before):
            near = column[max(0, m - kernel // 2) : m + kernel // 2 + 1]
            expected[head // 2, m] += sum(near) / kernel
    torch.testing.assert_close(head_scores(q, k, kernel), expected)


# The pruned run


def test_pruned_run_keeps_the_budget(random_model: TinyDecoder) -> None:
    ids = random_ids(300, 512)
    run = generate(random_model, ids, kept=64, max_tokens=3, **RULE)
    assert run.selection_layer is not None
    assert 2 <= run.selection_layer < 5
    assert len(run.ratios) == run.selection_layer - 1
    assert min(run.ratios[:-1]) >= RULE["tau"] > run.ratios[-1]
    assert len(run.kept_per_layer) == 6
    assert run.propagated is not None
    for layer, kept in enumerate(run.kept_per_layer):
        assert kept.shape == (2, 64)
        assert (kept.diff() > 0).all()
        assert (kept[:, -8:] == torch.arange(292, 300)).all()
        if layer > run.selection_layer:
            assert (kept == run.propagated).all()


def test_budget_of_the_prompt_is_full_attention(random_model: TinyDecoder) -> None:
    ids = random_ids(100, 512)
    full = generate(random_model, ids, kept=None, max_tokens=4, **RULE)
    assert generate(random_model, ids, kept=100, max_tokens=4, **RULE) == full
    # All but one token kept, in every layer: nearly the same distribution.
    near = generate(random_model, ids, kept=99, max_tokens=1, policy="snapkv", **RULE)
    assert near.selection_layer is None
    assert near.logprobs[0] == pytest.approx(full.logprobs[0], abs=0.1)


def test_modes_differ_and_repeat(random_model: TinyDecoder) -> None:
    ids = random_ids(300, 512)
    modes = (
        {"kept": None},
        {"kept": 64},
        {"kept": 64, "policy": "snapkv"},
        {"kept": 64, "policy": "random", "selection_layer": 3},
        {"kept": 64, "policy": "random", "selection_layer": 3, "seed": 1},
        {"kept": 64, "selection_layer": 1},
    )
    runs = [
        [generate(random_model, ids, max_tokens=6, **RULE, **m).logprobs for m in modes]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len({tuple(logprobs) for logprobs in runs[0]}) == len(modes)


def test_stops_after_eos(random_model: TinyDecoder) -> None:
    ids = random_ids(50, 512)
    run = generate(random_model, ids, kept=None, max_tokens=5, **RULE)
    end = run.tokens[2]
    stopped = generate(random_model, ids, kept=None, max_tokens=5, eos_id=end, **RULE)
    assert stopped.tokens == run.tokens[: run.tokens.index(end) + 1]


# Published policies


PUBLISHED = {"kept": 64, "max_tokens": 6}


def test_fastkv_between_snapkv_and_one_layers_selection(
    random_model: TinyDecoder,
) -> None:
    """A rate of 1 drops nothing; one below the budget leaves the budget."""
    ids = random_ids(300, 512)
    shape = {"window": 8, "pool_kernel": 7, "tsp_layer": 2}
    whole = published.fastkv(random_model, ids, tsp_rate=1.0, **shape, **PUBLISHED)
    snapkv = generate(random_model, ids, policy="snapkv", **RULE, **PUBLISHED)
    assert whole.logprobs == pytest.approx(snapkv.logprobs, abs=1e-5)
    assert whole.layer_tokens == [300] * 6
    least = published.fastkv(random_model, ids, tsp_rate=0.1, **shape, **PUBLISHED)
    fixed = generate(random_model, ids, selection_layer=2, **RULE, **PUBLISHED)
    assert least.logprobs == pytest.approx(fixed.logprobs, abs=1e-5)
    assert torch.equal(least.propagated, fixed.propagated)
    assert least.layer_tokens == fixed.layer_tokens == [300] * 3 + [64] * 3
    between = published.fastkv(random_model, ids, tsp_rate=0.5, **shape, **PUBLISHED)
    assert between.layer_tokens == [300] * 3 + [150] * 3
    for kept in between.kept_per_layer[3:]:
        assert kept.shape == (2, 64)
        assert torch.isin(kept, between.propagated).all()


def test_gemfilters_positions_do_not_matter(random_model: TinyDecoder) -> None:
    """Its tokens at 0 to k - 1, as published, or at the prompt's last positions."""
    ids = random_ids(300, 512)
    run = published.gemfilter(random_model, ids, filter_layer=3, **PUBLISHED)
    chosen = torch.tensor(ids)[run.propagated]
    assert len(chosen) == 64
    assert run.propagated[-1] == 299
    everything = torch.cat([chosen, torch.tensor(run.tokens)])
    logprobs = [
        random_model.forward(everything, first).log_softmax(-1)[63:-1]
        for first in (0, 300 - 64, 4000)
    ]
    for at in logprobs:
        own = at[range(6), run.tokens]
        torch.testing.assert_close(own, torch.tensor(run.logprobs), rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs[1], logprobs[0], rtol=0, atol=1e-4)


def test_pyramidinfer_without_decay_drops_nothing(random_model: TinyDecoder) -> None:
    ids = random_ids(300, 512)
    run = published.pyramidinfer(
        random_model, ids, window=8, decay_ratio=1.0, **PUBLISHED
    )
    assert run.layer_tokens == [300] * 6
    assert run.selection_layer is None
    run = published.pyramidinfer(
        random_model, ids, window=8, decay_ratio=0.9, **PUBLISHED
    )
    # 292 before the window, times 0.9 + 0.1 (cos(pi l / 6) + 1) / 2 after each layer.
    assert run.layer_tokens == [300, 300, 298, 290, 275, 254]
    for kept in run.kept_per_layer:
        assert kept[0, :4].tolist() == [0, 1, 2, 3]
        assert torch.equal(kept[0], kept[1])


# The tasks


def test_vocabulary_is_the_tokenizers() -> None:
    vocab = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json")).get_vocab()
    words = sorted(vocab, key=vocab.__getitem__)
    assert words[: len(VOCABULARY)] == VOCABULARY
    assert all(word.startswith("<unused") for word in words[len(VOCABULARY) :])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tokens", [32, 333, 2048])
def test_prompt_text_and_ids_agree(task: str, num_tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    for seed in range(3):
        prompt = TASKS[task](seed, num_tokens)
        assert len(prompt.token_ids) == num_tokens
        assert tokenizer.encode(prompt.text).ids == prompt.token_ids
        assert prompt == TASKS[task](seed, num_tokens)
        assert prompt != TASKS[task](seed + 1, num_tokens)
        context, question = prompt.text.rsplit(" question : ", 1)
        assert f"{question} {' '.join(prompt.answer_words)} " in context


@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_random_models_tokenizer(tmp_path: Path, arch: str) -> None:
    write_random_model(tmp_path, **SMALL, arch=arch)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w4 w511 w10").input_ids == [1, 4, 511, 10]
    assert tokenizer.decode([4, 511, 2], skip_special_tokens=True) == "w4 w511"
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("task", TASKS)
def test_full_attention_answers(tiny: TinyDecoder, task: str) -> None:
    prompts = [TASKS[task](seed, 512) for seed in range(10)]
    right = sum(answer(tiny, p, kept=None).tokens == p.answer_ids for p in prompts)
    print(f"{task}: {right}/10 right under full attention at 512 tokens")
    assert right >= 8


@pytest.mark.parametrize("task", TASKS)
def test_pruned_answers_match_full_attention(tiny: TinyDecoder, task: str) -> None:
    prompts = [TASKS[task](seed, 2048) for seed in range(5)]
    pruned = {"kept": 96, "selection_layer": 4}
    full = [answer(tiny, p, kept=None).tokens for p in prompts]
    asl = [answer(tiny, p, **pruned).tokens for p in prompts]
    control = [answer(tiny, p, policy="random", **pruned).tokens for p in prompts]
    same = sum(a == b for a, b in zip(asl, full, strict=True))
    chance = sum(a == b for a, b in zip(control, full, strict=True))
    print(f"{task}: {same}/5 as full attention, random control {chance}/5")
    assert same == 5
    assert chance <= 1


@pytest.mark.parametrize("task", TASKS)
def test_adaptive_answers(tiny: TinyDecoder, task: str) -> None:
    prompts = [TASKS[task](seed, 1024) for seed in range(5)]
    runs = [answer(tiny, p, kept=96, l_min=4, tau=0.8) for p in prompts]
    layers = [run.selection_layer for run in runs]
    print(f"{task}: selection layers {layers}")
    assert [run.tokens for run in runs] == [p.answer_ids for p in prompts]
    assert {5, 6, 7, None} >= set(layers)
    assert layers.count(5) >= 3
