"""Tasks: the answer follows from the prompt and nothing else does; published texts."""

from __future__ import annotations

import random
import re
import uuid
from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks.accuracy.tasks import TASKS, Room, Sample, texts, words
from benchmarks.accuracy.tasks.english import NOISE, all_words
from tests.accuracy.fakes import PieceTokenizer

ROOM = Room(4096, PieceTokenizer().count)


def written(name: str, seed: int, size: int, room: Room = ROOM) -> Sample:
    return TASKS[name].build(random.Random(seed), size, room)


def niah(sample: Sample) -> list[str]:
    query = re.search(r"What is the special magic \w+ for (\S+) ment", sample.text)
    assert query
    return re.findall(rf"for {query[1]} is: (\S+)\.", sample.text)


def vt(sample: Sample) -> list[str]:
    text = sample.text.split("Memorize and track")[-1]
    query = re.search(r"assigned the value (\d+) in", text)
    assert query
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        values[name] = values.get(source, source)
    return [name for name, value in values.items() if value == query[1]]


def cwe(sample: Sample) -> list[str]:
    text = sample.text.split("most often.\n")[-1].split("\nQuestion")[0]
    entries = re.split(r" ?\d+\. ", text)[1:]
    ranked = Counter(entries).most_common()
    assert ranked[9][1] > ranked[10][1]
    return [word for word, _ in ranked[:10]]


def fwe(sample: Sample) -> list[str]:
    coded = sample.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = Counter(coded).most_common()
    assert ranked[0][0] == "..."
    assert ranked[3][1] > ranked[4][1]
    return [word for word, _ in ranked[1:4]]


def digits(sample: Sample) -> list[str]:
    found = re.findall(r"\d+", sample.text)
    assert len(found) == 2
    return list(set(found))


def pair(sample: Sample) -> list[str]:
    key = re.search(r'Key: "(\S+)"', sample.text)
    assert key
    return re.findall(rf'"{key[1]}": "(\S+)"', sample.text)


def fact(sample: Sample) -> list[str]:
    text, question = sample.text.split("question : ")
    return [found.strip() for found in re.findall(rf"{question} ([\d ]+)", text)]


def hop(sample: Sample) -> list[str]:
    text, name = sample.text.split("question : value of ")
    values = dict(re.findall(r"let (\w+) = (\w+) ;", text))
    value = name.split()[0]
    while value in values:
        value = values[value]
    return [value]


def note(sample: Sample) -> list[str]:
    text, question = sample.text.split("What does the note of ")
    name = question.split()[0]
    return re.findall(rf'The note of {name} says: "(.*)\."', text)


SOLVERS: dict[str, Callable[[Sample], list[str]]] = {
    "niah_single_1": niah,
    "niah_multikey_2": niah,
    "niah_multikey_3": niah,
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "passkey": digits,
    "number_string": digits,
    "kv_retrieval": pair,
    "quote": note,
    "needle": fact,
    "key_value": fact,
    **{f"hops_{n}": hop for n in range(1, 5)},
}


ANSWERED = [name for name, task in TASKS.items() if not task.own_answer]


def test_every_task_is_solved() -> None:
    assert SOLVERS.keys() == set(ANSWERED)
    assert set(TASKS) - SOLVERS.keys() == {"explain"}


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("more", [0, 1, 90])
def test_the_answer_follows_from_the_prompt(name: str, more: int) -> None:
    task = TASKS[name]
    for seed in range(5):
        sample = written(name, seed, task.smallest + more)
        assert SOLVERS[name](sample) == list(sample.answers) or (
            name == "cwe" and set(SOLVERS[name](sample)) == set(sample.answers)
        )
        assert len(set(sample.answers)) == len(sample.answers)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_right_answer_scores_one_and_another_prompts_none(name: str) -> None:
    task = TASKS[name]
    size = task.smallest + 90
    mine, *others = (written(name, seed, size).answers for seed in range(9))
    assert task.score(" " + " ".join(mine), mine) == 1
    wrong = [task.score(" " + " ".join(other), mine) for other in others]
    assert sum(wrong) / len(wrong) < 0.3
    assert task.score("", mine) == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_writes_the_same_prompt(name: str) -> None:
    size = TASKS[name].smallest + 20
    assert written(name, 3, size) == written(name, 3, size)
    assert written(name, 3, size) != written(name, 4, size)


def test_needles_of_ruler_are_put_as_published() -> None:
    """niah.py makes the singular of its template by these replacements."""
    template = (
        "Some special magic {type_needle_v} are hidden within the following text. Make "
        "sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n"
        "{context}\nWhat are all the special magic {type_needle_v} for {query} "
        "mentioned in the provided text? The special magic {type_needle_v} for {query} "
        "mentioned in the provided text are"
    )
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template = template.replace(old, new)
    sample = written("niah_single_1", 0, 3)
    value = sample.answers[0]
    found = re.search(r"numbers for (\S+) is: (\d+)\.", sample.text)
    assert found and found[2] == value and len(value) == 7
    needle = f"One of the special magic numbers for {found[1]} is: {value}."
    context = sample.text.split("\n")[1:-1]
    assert sorted(context) == sorted([needle, NOISE, NOISE, NOISE])
    asked = template.format(
        type_needle_v="number", query=found[1], context="\n".join(context)
    )
    assert sample.text + sample.prefix == asked


def test_multikey_haystacks_are_other_needles() -> None:
    for name, kind in (("niah_multikey_2", "numbers"), ("niah_multikey_3", "uuids")):
        lines = written(name, 0, 40).text.split("\n")[1:-1]
        pattern = rf"One of the special magic {kind} for (\S+) is: (\S+)\."
        found = [re.fullmatch(pattern, line) for line in lines]
        assert len(lines) == 41 and all(found)
        keys, values = zip(*(match.groups() for match in found if match), strict=True)
        assert len(set(keys)) == len(set(values)) == 41
        if kind == "uuids":
            assert {uuid.UUID(text).version for text in (*keys, *values)} == {4}


def test_needles_lie_anywhere() -> None:
    places = set()
    for seed in range(200):
        lines = written("niah_single_1", seed, 5).text.split("\n")[1:-1]
        places.add(next(i for i, line in enumerate(lines) if line != NOISE))
    assert places == set(range(5))  # never behind the last sentence, as there


def test_variable_tracking_has_an_example_of_up_to_500_tokens() -> None:
    sample = written("vt", 0, 40)
    head = "Memorize and track the chain(s) of variable assignment hidden"
    _, example, asked = sample.text.split(head)
    assert 400 < ROOM.count(head + example) <= 510
    assert len(re.findall(r"VAR [A-Z]{3} =", example)) == 5
    statements = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)", asked, re.M)
    names = [name for name, _ in statements]
    assert names == list(sample.answers)
    assert [source for _, source in statements[1:]] == names[:-1]
    answer = re.search(r"they are:  ((?:[A-Z]{3} ?){5})\n\n$", example)
    assert answer and answer[1].split() == re.findall(r"VAR ([A-Z]{3}) =", example)
    assert sample.prefix.endswith("variables are assgined the value "
        f"{re.findall(r'value ([0-9]+)', asked)[0]}, they are: ")  # fmt: skip


@pytest.mark.parametrize(
    ("length", "common", "uncommon"), [(2048, 6, 1), (4096, 30, 3)]
)
def test_common_words_recur_as_published(
    length: int, common: int, uncommon: int
) -> None:
    room = Room(length, ROOM.count)
    sample = written("cwe", 0, 50, room)
    text = sample.text.split("most often.\n")[-1].split("\nQuestion")[0]
    counts = Counter(re.split(r" ?\d+\. ", text)[1:])
    assert sorted(counts.values()) == [uncommon] * 40 + [common] * 10
    assert text.startswith("1. ")
    example = sample.text.split("\nBelow is")[0]
    assert example.count(". ") > 40 and "Answer: The top 10 words" in example


def test_there_are_words_enough() -> None:
    largest = TASKS["cwe"].largest
    assert largest is not None and largest <= len(all_words())


def test_frequent_words_follow_the_zeta_distribution() -> None:
    coded = written("fwe", 0, 1000).text.split("coded words. ")[1]
    counts = Counter(coded.split("\nQuestion")[0].split()).most_common()
    # 1000 k^-2 / 1.644934, rounded down; a vocabulary of 4096 // 50 words.
    assert [count for _, count in counts[:6]] == [607, 151, 67, 37, 24, 16]
    assert len(counts) == 24  # k^2 up to 607.9
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])


def test_infinitebench_prompts_are_put_as_published() -> None:
    key = written("passkey", 0, 2).answers[0]
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    noise = f"{NOISE}\n"
    head = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and"
        " memorize them. I will quiz you about the important information there.\n\n"
    )
    possible = [
        f"{head}{noise * before}{needle}{noise * (2 - before)}\n\nWhat is the pass key?"
        "\n\nThe pass key is"
        for before in range(3)
    ]
    sample = written("passkey", 0, 2)
    assert sample.text + sample.prefix in possible
    pairs = written("kv_retrieval", 0, 3)
    assert re.fullmatch(
        r"Extract the value corresponding to the specified key in the JSON object below"
        r'\.\n\nJSON data:\n\{("[0-9a-f-]{36}": "[0-9a-f-]{36}"(, )?){3}\}\n\nKey: '
        r'"[0-9a-f-]{36}"\nThe value associated with the specified key is: ',
        pairs.text,
    )


def test_digits_of_number_string_repeat() -> None:
    for seed in range(20):
        key = written("number_string", seed, 2).answers[0]
        assert len(key) == 10
        assert len(re.sub(r"(.)\1+", r"\1", key)) <= 5


@pytest.mark.parametrize("values", [(words.ADJECTIVES,), (words.DIGITS, words.DIGITS)])
def test_hops_take_as_many_statements(
    values: tuple[list[str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "HOP_VALUES", values)
    for n in range(1, words.MOST_HOPS + 1):
        for seed in range(30):
            prompt, answer = words.hops(random.Random(seed), 60 + seed * 10, n)
            text = " ".join(prompt)
            assert len(prompt) == 60 + seed * 10
            facts = dict(re.findall(r"let (\w+) = ([\w ]+?) ;", text))
            name, steps = text.split()[-2], 0
            while name in facts:
                name, steps = facts[name], steps + 1
            assert (name, steps) == (" ".join(answer), n)
            assert list(facts.values()).count(name) == 1


def test_too_few_words_are_refused() -> None:
    for write in (words.needle, words.key_value):
        with pytest.raises(ValueError, match="too few"):
            write(random.Random(0), 8)
    with pytest.raises(ValueError, match="too few"):
        words.hops(random.Random(0), 20, 4)
    with pytest.raises(ValueError, match="hop 5"):
        words.hops(random.Random(0), 200, 5)


def test_the_words_are_the_tokenizers() -> None:
    assert len(set(words.VOCABULARY)) == len(words.VOCABULARY)
    for name in ("needle", "key_value", *(f"hops_{n}" for n in range(1, 5))):
        assert set(written(name, 0, 300).text.split()) <= set(words.VOCABULARY)


def test_a_note_is_quoted_up_to_its_first_wrong_word() -> None:
    sample = written("quote", 0, 3)
    (sentence,) = sample.answers
    words = sentence.split()
    assert words[0] == "The"
    assert 20 <= len(words) <= 40
    score = TASKS["quote"].score
    assert score(f'{sentence}."', sample.answers) == 1
    half = [*words[:13], "otherwise", *words[14:]]
    assert score(" ".join(half), sample.answers) == 13 / len(words)


def test_passages_are_of_pythons_own_documentation() -> None:
    found = texts.passages()
    assert len(found) == len(set(found)) > 300
    assert any("Abstract base class" in text or "context manager" in text
               for text in found)  # fmt: skip
    # As many tokens as asked for, less what the last word would be too much.
    count = PieceTokenizer().count
    for size in (100, 1500, 120_000):
        once = texts.some(random.Random(1), size, count)
        assert size - 25 <= sum(map(count, once)) <= size
        assert once == texts.some(random.Random(1), size, count)
    one, other = (texts.some(random.Random(seed), 500, count) for seed in (1, 2))
    assert one != other
