"""However a request ends, its last output says what came of its prompt."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor

from asl_vllm.engine.frontend import endings
from asl_vllm.engine.frontend.usage import collect
from asl_vllm.engine.frontend.usage import install as install_usage
from asl_vllm.engine.result import PromptResult
from asl_vllm_testing.vllm_configs import engine_config

TOLD = {
    **{"policy": "asl", "selection_layer": 3, "budget_tokens": 64},
    **{"kept_tokens": 40, "pruned_tokens": 160, "freed_blocks": 5},
    **{"skipped_token_layers": 960, "reused_tokens": 0},
    **{"reused_token_layers": 0, "rerun_token_layers": 0, "filled_tokens": 0},
    "shared_prefills": 0,
}


@pytest.fixture
def processor() -> OutputProcessor:
    endings.install()
    install_usage()
    tokenizer = cached_tokenizer_from_config(engine_config().model_config)
    return OutputProcessor(tokenizer, log_stats=False)


def add(processor: OutputProcessor, name: str = "a", **sampling: Any) -> str:
    """A request; the text of the token that its stop string will be found in."""
    assert processor.tokenizer is not None
    stop = processor.tokenizer.decode([9])
    params = SamplingParams(
        **{"stop": [stop], "max_tokens": 9, **sampling},
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    request = EngineCoreRequest(
        request_id=name,
        external_req_id="one",
        prompt_token_ids=[7] * 200,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    processor.add_request(request, "the prompt", None, 0)
    return str(stop)


def output(processor: OutputProcessor, token: int, **fields: Any) -> Any:
    done = processor.process_outputs(
        [EngineCoreOutput(fields.pop("name", "a"), [token], **fields)]
    )
    (made,) = done.request_outputs
    return made, done.reqs_to_abort


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_stop_string(processor: OutputProcessor, before: int) -> None:
    """The engine is told to abort, and its own report does not come."""
    with collect() as usage:
        add(processor)
        told: dict[str, Any] = {"kv_transfer_params": TOLD}
        for _ in range(before):
            made, _ = output(processor, 8, **told)
            told = {}
            assert made.kv_transfer_params is None
            assert usage.result() is None
        made, aborts = output(processor, 9, **told)
    assert aborts == ["a"]
    assert made.finished
    assert made.outputs[0].finish_reason == "stop"
    assert made.kv_transfer_params == TOLD
    assert usage.result() == PromptResult(**TOLD)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_the_engines_last_word_counts(
    processor: OutputProcessor, reason: FinishReason
) -> None:
    """A preempted prompt may have been prefilled again since its first token."""
    add(processor)
    output(processor, 8, kv_transfer_params=TOLD)
    last = {**TOLD, "kept_tokens": 72}
    made, _ = output(processor, 8, kv_transfer_params=last, finish_reason=reason)
    assert made.kv_transfer_params == last


def test_a_request_without_a_budget_says_nothing(processor: OutputProcessor) -> None:
    add(processor)
    output(processor, 8)
    made, _ = output(processor, 9)
    assert made.finished
    assert made.kv_transfer_params is None
