"""Layer-major prefill of pruned prompts.

A prompt goes through the model layer by layer, in chunks inside each layer, so
that the tokens kept of a layer are known before the next one starts. Short prompts
pass a layer together. The package imports no serving engine: it drives a `DecoderModel`
that the engine provides.
"""

from asl_vllm.prefill.agreement import OtherRankError, RankLostError
from asl_vllm.prefill.bands import Bands
from asl_vllm.prefill.buffers import PrefillBuffers
from asl_vllm.prefill.factory import PrefillFactory
from asl_vllm.prefill.job import PrefillJob, PrefillProgress, PrefillReport
from asl_vllm.prefill.model import DecoderModel, Known, Verdict
from asl_vllm.prefill.pack import Pack
from asl_vllm.prefill.packer import MOST_PACKED, Packer, most_packed
from asl_vllm.prefill.passes import Prefill
from asl_vllm.prefill.queue import PrefillOutcome, PrefillQueue
from asl_vllm.prefill.shape import ModelShape
from asl_vllm.prefill.tap import KeysTaken, LayerTap

__all__ = [
    "MOST_PACKED",
    "Bands",
    "DecoderModel",
    "KeysTaken",
    "Known",
    "LayerTap",
    "ModelShape",
    "OtherRankError",
    "Pack",
    "Packer",
    "Prefill",
    "PrefillBuffers",
    "PrefillFactory",
    "PrefillJob",
    "PrefillOutcome",
    "PrefillProgress",
    "PrefillQueue",
    "PrefillReport",
    "RankLostError",
    "Verdict",
    "most_packed",
]
