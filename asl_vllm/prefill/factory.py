"""Makes the `Prefill` of a job from what a worker owns."""

from __future__ import annotations

from asl_vllm.config import AslConfig
from asl_vllm.prefill.agreement import agreed
from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.job import PrefillJob
from asl_vllm.prefill.model import DecoderModel
from asl_vllm.prefill.passes import Prefill
from asl_vllm.selection.policies import installed_policies, make_policy


class PrefillFactory:
    """Holds the model and the buffers; lends both to one `Prefill` after another."""

    def __init__(
        self,
        model: DecoderModel,
        buffers: PrefillBuffers,
        config: AslConfig,
        chunk_tokens: int,
    ) -> None:
        self.model = model
        self._scored = model.shape.scored_layers
        self.buffers = buffers
        self.config = config
        self.chunk_tokens = chunk_tokens

    def most_passing(self, job: PrefillJob) -> int:
        """Tokens of ``job`` that pass a layer at most."""
        tokens = job.num_prompt_tokens
        policy = installed_policies().get(job.policy)
        if not job.reused_tokens or policy is None:
            return tokens
        # Tokens of the prefix that are selected pass after all.
        deeper = policy.most_deeper(self.config, tokens, job.kept_tokens)
        return max(tokens - job.reused_tokens, deeper)

    def __call__(self, job: PrefillJob) -> Prefill:
        """A prefill of ``job``, not yet begun."""
        with agreed(self.model):
            policy = make_policy(
                job.policy,
                self.config.counted_in(self._scored),
                num_layers=len(self._scored),
                kept_tokens=job.kept_tokens,
            )
            policy.newest = self.model.shape.widest_window
            prefill = Prefill(
                job, self.model, policy, self.buffers, chunk_tokens=self.chunk_tokens
            )
        return prefill
