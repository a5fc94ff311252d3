"""Model runner V2, the default on GPUs, prunes as the oracle does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from asl_vllm.selection.budget import resolve_kept
from asl_vllm_testing import TINY_MODEL
from asl_vllm_testing.harness import BLOCK
from asl_vllm_testing.oracle.asl import generate
from asl_vllm_testing.oracle.model import TinyDecoder
from asl_vllm_testing.oracle.tasks import key_value, needle

# As in tests/e2e/interpreted_v2.py, which is not to be imported here.
RULE = {"window": 8, "pool_kernel": 7, "l_min": 4, "l_obs": 2, "tau": 0.9}
PROMPTS = [
    needle(1, 600).token_ids,
    key_value(2, 333).token_ids,
    needle(3, 450).token_ids,
]


def test_answers_equal_the_oracles_with_and_without_full_shallow_layers() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "asl_vllm_testing.interpreted_v2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    (plain, _), *pruned = json.loads(process.stdout.strip().splitlines()[-1])
    model = TinyDecoder.load(TINY_MODEL)
    want = generate(model, PROMPTS[0], kept=None, max_tokens=6, **RULE)
    assert plain == want.tokens
    modes = [(ids, bands) for bands in (None, 5) for ids in PROMPTS]
    for (tokens, report), (ids, bands) in zip(pruned, modes, strict=True):
        kept = resolve_kept(128, num_prompt_tokens=len(ids), block_size=BLOCK, window=8)
        want = generate(
            model, ids, kept=kept, max_tokens=6, full_bands=bands, **RULE
        )  # fmt: skip
        assert tokens == want.tokens
        assert report["selection_layer"] == want.selection_layer
