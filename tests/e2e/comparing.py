"""What an engine selected and answered, against an oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asl_vllm.selection.policies import Keep
from asl_vllm_testing.oracle.asl import OracleResult


def assert_same_selection(decisions: list, want: OracleResult, num_tokens: int) -> None:
    """Each layer's kept tokens, as positions of the prompt, are the oracle's."""
    positions, first_dropped, kept = torch.arange(num_tokens), None, []
    for decision in decisions:
        if decision.kept is not Keep.NONE:
            kept.append(positions[decision.kept])
        if decision.deeper is not Keep.ALL:
            positions = positions[decision.deeper]
            first_dropped = positions if first_dropped is None else first_dropped
    kept_heads = len(want.kept_per_layer[0])
    # Layers that no decision was asked about keep all that they were given.
    missing = len(want.kept_per_layer) - len(kept)
    kept += [positions.expand(kept_heads, -1)] * missing
    for layer, (mine, theirs) in enumerate(zip(kept, want.kept_per_layer, strict=True)):
        assert torch.equal(mine, theirs), layer
    assert (first_dropped is None) == (want.propagated is None)
    if first_dropped is not None:
        assert torch.equal(first_dropped, want.propagated)


def assert_same_answer(
    output: Any, want: OracleResult, num_tokens: int, num_layers: int = 0
) -> None:
    """Report, tokens and their log probabilities are the oracle's.

    ``num_layers`` where layers with a sliding window are among them.
    """
    report = output.kv_transfer_params
    assert report["selection_layer"] == want.selection_layer
    assert report["kept_tokens"] == len(want.kept_per_layer[0][0])
    full = num_tokens * (num_layers or len(want.kept_per_layer))
    skipped = max(0, full - sum(want.layer_tokens))
    assert report["skipped_token_layers"] == skipped
    answer = output.outputs[0]
    assert list(answer.token_ids) == want.tokens
    logprobs = [
        given[token].logprob
        for given, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    assert logprobs == pytest.approx(want.logprobs, abs=1e-3)
