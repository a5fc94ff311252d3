"""Answers without a server are the oracle's, which shares nothing but a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.oracle import asl, published
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import key_value
from benchmarks.accuracy.__main__ import main, replies_path
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.direct import DirectModel, variant
from benchmarks.accuracy.tokens import HubTokenizer

MODEL = str(TINY_MODEL)
WINDOW, POOL, KEPT, LENGTH = 8, 7, 72, 296
RULE = {"window": WINDOW, "pool_kernel": POOL, "l_min": 4, "l_obs": 2, "tau": 0.9}


@pytest.fixture(scope="module")
def oracle() -> TinyDecoder:
    return TinyDecoder.load(MODEL)


def expected(oracle: TinyDecoder, policy: str, ids: list[int]) -> asl.OracleResult:
    if policy == "fastkv":
        return published.fastkv(
            *(oracle, ids),
            **{"kept": KEPT, "window": WINDOW, "pool_kernel": POOL},
            **{"tsp_layer": 3, "tsp_rate": 0.2, "max_tokens": 3},
        )
    if policy == "pyramidinfer":
        return published.pyramidinfer(
            oracle, ids, kept=KEPT, window=WINDOW, decay_ratio=0.9, max_tokens=3
        )
    if policy == "gemfilter":
        return published.gemfilter(oracle, ids, kept=KEPT, filter_layer=3, max_tokens=3)
    return asl.generate(
        oracle,
        ids,
        kept=None if policy == "full" else KEPT,
        policy="asl" if policy == "full" else policy,
        max_tokens=3,
        **RULE,  # type: ignore[arg-type]
    )


def test_reach_and_score_layers_answer_as_the_oracle(oracle: TinyDecoder) -> None:
    model, tokenizer = DirectModel(MODEL, LENGTH, WINDOW), HubTokenizer(MODEL, "none")
    rule = RULE | {"tau": 2.0, "reach": 9, "score_layers": 3}
    made = variant(MODEL, 32, rule, ["asl"])
    for seed in range(2):
        ids = key_value(seed, LENGTH).token_ids
        model.layers.begin_prompt(ids)
        reply = model.reply(made, Cell("asl", "asl", KEPT), ids, 3)
        truth = asl.generate(oracle, ids, kept=KEPT, max_tokens=3, **rule)  # type: ignore[arg-type]
        assert reply.text == tokenizer.decode(truth.tokens)
        assert reply.kv_cache is not None
        assert truth.selection_layer is not None
        assert reply.kv_cache["selection_layer"] == truth.selection_layer


def test_every_policy_answers_as_the_oracle(oracle: TinyDecoder) -> None:
    """One prompt after another, policies in turn over the layers they share."""
    model = DirectModel(MODEL, LENGTH, WINDOW)
    tokenizer = HubTokenizer(MODEL, "none")
    options = {
        "fastkv": RULE | {"selection_layer": 3},
        "gemfilter": RULE | {"selection_layer": 3},
    }
    layers = set()
    for seed in range(3):
        ids = key_value(seed, LENGTH).token_ids
        model.layers.begin_prompt(ids)
        for policy in ("full", "asl", "snapkv", "fastkv", "gemfilter", "pyramidinfer"):
            made = variant(MODEL, 32, options.get(policy, RULE), [policy])
            budget = None if policy == "full" else KEPT
            cell = Cell(policy, policy, budget)
            reply = model.reply(made, cell, ids, 3)
            truth = expected(oracle, policy, ids)
            assert reply.text == tokenizer.decode(truth.tokens), policy
            for guess in (reply.text, "red red red", f"{reply.text} red", "a"):
                assert model.reply(made, cell, ids, 3, guess) == reply, (policy, guess)
            begun = " ".join([*reply.text.split()[:1], "red"])
            assert model.reply(made, cell, ids, 3, begun) == reply, (policy, begun)
            if policy != "full":
                assert reply.kv_cache is not None
                layer = reply.kv_cache["selection_layer"]
                assert layer == truth.selection_layer, policy
                assert reply.kv_cache["kept_tokens"] == KEPT
                skipped = LENGTH * 10 - sum(truth.layer_tokens)
                assert reply.kv_cache["skipped_token_layers"] == max(0, skipped)
                layers.add((policy, layer))
    # Some of them do select, and so go on without the layers they share.
    assert {policy for policy, layer in layers if layer is not None} >= {
        *("asl", "fastkv", "gemfilter", "pyramidinfer")
    }


def test_answers_found_together_are_those_found_alone() -> None:
    """Whatever the guess: right for all, for some, in part, or for none."""
    model = DirectModel(MODEL, LENGTH, WINDOW)
    made = variant(MODEL, 32, RULE, ["asl"])
    budgets = {"full": [None], "asl": [KEPT, 150], "gemfilter": [41, KEPT, 150]}
    pairs = [
        (made, Cell(policy, policy, budget))
        for policy, sizes in budgets.items()
        for budget in sizes
    ]
    ids = key_value(1, LENGTH).token_ids
    model.layers.begin_prompt(ids)
    short = [*ids[:1], *ids[-60:]]
    asked = [(*pair, ids) for pair in pairs]
    asked.append((made, Cell("recency", "recency", 61), short))
    alone = [model.reply(*one, 6) for one in asked]
    right = alone[0].text
    assert len({reply.text for reply in alone}) > 1
    for guess in ("", right, right.split()[0], alone[-1].text, "red"):
        assert model.replies(asked, 6, guess) == alone, guess
    assert model.replies([], 6) == []


@pytest.mark.usefixtures("forked")
def test_cells_that_coincide_are_answered_once(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = [
        *("--direct", MODEL, "--policies", "asl,asl,recency", "--asl-layers", "6"),
        *("--policy-config", json.dumps(RULE | {"selection_layer": 6})),
        *("--tasks", "needle", "--lengths", "300", "--budgets", "1/4,75,0.25"),
        *("--pool-kernels", "3"),
        *("--n", "2", "--concurrency", "1", "--output", str(output)),
    ]
    assert main(arguments) == 0
    found = [(row["policy"], row["budget"], row["index"]) for row in rows(output)]
    assert sorted(found) == sorted(
        (policy, 75, index)
        for policy in ("asl@6", "asl@6 pooled 3", "recency")
        for index in range(2)
    )


def rows(output: Path) -> list[dict[str, Any]]:
    lines = replies_path(output).read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.usefixtures("forked")
def test_a_run_goes_on_where_it_was_and_sweeps_layers(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = [
        *("--direct", MODEL, "--policy-config", json.dumps(RULE)),
        *("--policies", "full,asl,fastkv,recency,random"),
        *("--fastkv-layers", "3,5", "--asl-layers", "6"),
        *("--tasks", "needle,key_value", "--lengths", "300", "--budgets", "1/4"),
        *("--n", "3", "--concurrency", "2", "--output", str(output)),
    ]
    assert main(arguments) == 0
    whole = rows(output)
    labels = ["full", "asl", "recency", "random", "fastkv@3", "fastkv@5", "asl@6"]
    assert len(whole) == 2 * 3 * len(labels)
    assert {row["policy"] for row in whole} == set(labels)
    assert {row["selection_layer"] for row in whole if row["policy"] == "asl@6"} == {6}
    full = [row["score"] for row in whole if row["policy"] == "full"]
    assert sum(full) >= 5
    assert main(arguments) == 2  # it would be gone on with only if asked
    lines = replies_path(output).read_text().splitlines(keepends=True)
    replies_path(output).write_text("".join(lines[:-5]))
    assert main([*arguments, "--resume"]) == 0
    again = rows(output)
    key = ("task", "index", "policy")
    assert sorted(again, key=lambda row: [str(row[k]) for k in key]) == sorted(
        whole, key=lambda row: [str(row[k]) for k in key]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", MODEL], "one of them"),
        (["--serve-args=--x"], "--serve-args needs --start"),
        (["--tokenizer", "x"], "--tokenizer goes with a server"),
        (["--base-url", "http://x"], "--base-url goes with a server"),
        (["--policies", "full", "--asl-layers", "3"], "asl is not in --policies"),
    ],
)
def test_options_that_say_nothing_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--direct", MODEL, "--output", "out.json", *options])
    assert message in capsys.readouterr().err


def test_errors_are_said_before_work(tmp_path: Path) -> None:
    ask = ["--direct", MODEL, "--tasks", "needle", "--output", str(tmp_path / "o.json")]
    assert main([*ask, "--policies", "none,best"]) == 2
    assert main([*ask, "--lengths", "9000"]) == 2
    assert main([*ask, "--lengths", "300,9"]) == 2
    assert main([*ask, "--asl-layers", "10"]) == 2
    assert main(["--direct", str(tmp_path), *ask[2:]]) == 2
    assert not list(tmp_path.iterdir())
    assert main([*ask, "--policy-config", '{"windows": 3}']) == 2
    assert not replies_path(tmp_path / "o.json").exists()
