"""For servers that are to be measured by `benchmarks.accuracy.fidelity`.

``PYTHONPATH=. vllm serve MODEL --logits-processors
benchmarks.accuracy.forced:ForcedAnswer``, in this repository's folder, takes
``"vllm_xargs": {"forced_tokens": [...]}``: the tokens of the answer, whatever the
model would say. The reply's logprobs are still the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FIELD = "forced_tokens"


@dataclass(frozen=True)
class _Forced:
    tokens: Sequence[int]

    def __call__(self, output_ids: Sequence[int], logits: Tensor) -> Tensor:
        at = len(output_ids)
        if at < len(self.tokens):
            logits.fill_(float("-inf"))
            logits[int(self.tokens[at])] = 0.0
        return logits


class ForcedAnswer(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves only the forced token, as long as there is one."""

    def is_argmax_invariant(self) -> bool:
        """It is not: vLLM then asks it for greedy requests as well."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> _Forced | None:
        """None: the request forces nothing."""
        tokens = (params.extra_args or {}).get(FIELD)
        return None if tokens is None else _Forced(tokens)
