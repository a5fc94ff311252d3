"""`vllm run-batch`, which is no HTTP server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from asl_vllm_testing import TINY_MODEL, warm
from asl_vllm_testing.oracle.tasks import needle
from asl_vllm_testing.server import MODEL_NAME
from asl_vllm_testing.settings import SERVER_OPTIONS

QUESTION = needle(7, 600)
MESSAGE = {"role": "user", "content": f"<s> {QUESTION.text}"}
PRUNED = 480


def test_the_batch_runner(tmp_path: Path) -> None:
    """One bad line is that line's error; the others are answered, with their proof."""
    lines = []
    for number, budget in enumerate((128, None, 3, 0.25)):
        body = {"model": MODEL_NAME, "messages": [MESSAGE], "kv_budget": budget}
        body |= {"max_tokens": 4, "temperature": 0}
        line = {"custom_id": str(number), "method": "POST", "body": body}
        lines.append(json.dumps({**line, "url": "/v1/chat/completions"}))
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(lines))
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch"),
        *("-i", str(asked), "-o", str(answered), "--model", str(TINY_MODEL)),
        *("--served-model-name", MODEL_NAME, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "4096", "--block-size", "32", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 27), *SERVER_OPTIONS),
    ]
    ran = warm.run(command)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = [json.loads(line) for line in answered.read_text().splitlines()]
    replies = {line["custom_id"]: line for line in found}
    assert "kv_budget" in json.dumps(replies["2"]["error"])
    for number, pruned in (("0", PRUNED), ("1", 0), ("3", PRUNED)):
        body = replies[number]["response"]["body"]
        assert body["choices"][0]["message"]["content"].split() == QUESTION.answer_words
        kept = body["usage"].get("kv_cache", {"pruned_tokens": 0})
        assert kept["pruned_tokens"] == pruned
