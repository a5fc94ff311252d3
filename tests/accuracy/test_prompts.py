"""Prompts: as long as asked for, the same for all who ask, tuning apart from test."""

from __future__ import annotations

import pytest

from asl_vllm_testing import TINY_MODEL
from benchmarks.accuracy.controls import CONTROLS, shortened
from benchmarks.accuracy.prompts import PromptMaker
from benchmarks.accuracy.tasks import GROUPS, TASKS, Sample
from benchmarks.accuracy.tokens import HubTokenizer
from tests.accuracy.fakes import PieceTokenizer, WordTokenizer

SMALL = GROUPS["small"]
ENGLISH = [name for name in TASKS if name not in SMALL]


def maker(small: bool = False, split: str = "test", seed: int = 0) -> PromptMaker:
    tokenizer = WordTokenizer() if small else PieceTokenizer()
    return PromptMaker(tokenizer, split=split, seed=seed)


@pytest.mark.parametrize("name", ENGLISH)
@pytest.mark.parametrize("length", [1500, 6000])
def test_prompts_are_nearly_as_long_as_asked_for(name: str, length: int) -> None:
    prompts = maker()
    for index in range(3):
        used = len(prompts.prompt(TASKS[name], length, index).token_ids)
        used += TASKS[name].max_tokens
        assert length - 0.05 * length <= used <= length


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("length", [64, 129, 1000])
def test_small_prompts_are_exactly_as_long(name: str, length: int) -> None:
    prompts = maker(small=True)
    for index in range(5):
        used = len(prompts.prompt(TASKS[name], length, index).token_ids)
        assert used + TASKS[name].max_tokens == length


def test_a_prompt_that_came_out_too_long_is_written_anew() -> None:
    prompts = maker()
    task = TASKS["niah_multikey_2"]
    prompts.prompt(task, 3000, 0)
    prompts._sizes[task.name, 3000] *= 3
    used = len(prompts.prompt(task, 3000, 1).token_ids) + task.max_tokens
    assert 2500 < used <= 3000


def test_no_list_is_longer_than_the_words_there_are() -> None:
    task = TASKS["cwe"]
    prompts = maker()
    assert prompts._largest_size(task, 1 << 19) == task.largest


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got 12, too short for the task {name}"):
        maker(name in SMALL).prompt(TASKS[name], 12, 0)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_depend_on_what_they_should(name: str) -> None:
    small, task = name in SMALL, TASKS[name]
    first = maker(small)
    prompts = [first.prompt(task, 1500, index).token_ids for index in range(3)]
    again = maker(small)
    again.prompt(task, 1400, 0)
    assert [again.prompt(task, 1500, i).token_ids for i in (2, 1, 0)] == prompts[::-1]
    others = (maker(small, split="tuning"), maker(small, seed=1))
    for other in others:
        prompts += [other.prompt(task, 1500, index).token_ids for index in range(3)]
    assert len({tuple(prompt) for prompt in prompts}) == 9


def test_other_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'train'; allowed: tuning, test"):
        maker(split="train")


def test_recency_keeps_the_last_tokens() -> None:
    ids = list(range(1, 101))
    keep = dict(kept=20, window=8, seed="")
    assert shortened("recency", ids, bos=1, **keep) == [1, *ids[-19:]]
    assert shortened("recency", ids, bos=None, **keep) == ids[-20:]
    assert shortened("recency", ids[:20], bos=None, **keep) == ids[:20]


@pytest.mark.parametrize("bos", [1, None])
def test_random_keeps_the_window_and_any_others(bos: int | None) -> None:
    ids = list(range(1, 101))
    seen: set[int] = set()
    for seed in range(100):
        args = dict(kept=20, window=8, bos=bos, seed=str(seed))
        kept = shortened("random", ids, **args)
        assert kept == shortened("random", ids, **args)
        assert kept == sorted(kept) and len(set(kept)) == 20
        assert kept[-8:] == ids[-8:]
        assert bos is None or kept[0] == 1
        seen |= set(kept)
    assert seen == set(ids)


def test_controls_refuse_what_they_cannot_do() -> None:
    for policy in CONTROLS:
        with pytest.raises(ValueError, match="got 8; allowed: above the window, 8"):
            shortened(policy, range(50), kept=8, window=8, bos=None, seed="")
    with pytest.raises(ValueError, match="got 'asl'; allowed: recency, random"):
        shortened("asl", range(50), kept=9, window=8, bos=None, seed="")


def test_templates() -> None:
    question = Sample("the sky is", ("blue",), " the")
    plain = HubTokenizer(str(TINY_MODEL), "none")
    ids = plain.encode(question)
    assert ids[0] == plain.bos == 1
    assert plain.count("the sky is the") == 4 == len(ids) - 1
    # The small model's chat template is the messages alone, without BOS.
    assert HubTokenizer(str(TINY_MODEL), "chat").encode(question) == ids[1:]
    around = HubTokenizer(str(TINY_MODEL), "<s> question : {task} answer :")
    text = "question : the sky is answer : the"
    assert around.encode(question) == [1, *plain.encode(Sample(text, ("",)))[1:]]
    with pytest.raises(ValueError, match="got 'llama'; allowed: none, chat, a text"):
        HubTokenizer(str(TINY_MODEL), "llama")
