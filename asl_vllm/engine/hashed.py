"""Our options in vLLM's configuration, without a part in the hash of compiled code.

Touch point: ``VllmConfig.additional_config``, hashed by its own ``compute_hash`` where
it is no dict. vLLM looks up compiled models by a hash of its whole configuration, so a
dict of other options would have the same model compiled again.
"""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from typing import Any

from vllm.config import VllmConfig

from asl_vllm.config import CONFIG_KEY
from asl_vllm.engine.settings import config_of_additional

RESERVING = (
    "bands",
    "chunk_tokens",
    "hidden_memory",
    "max_prefill_tokens",
    "pass_share",
    "window",
)
"""Options that memory taken at start-up depends on: vLLM remembers by the same hash how
large a KV pool there was room for."""


class HashedOptions(UserDict[str, Any]):
    """``additional_config`` of our options alone."""

    def compute_hash(self) -> str:
        """Of the options in `RESERVING`; no other has a part in what is compiled."""
        options = config_of_additional(self).to_dict()
        counted = {name: options[name] for name in RESERVING}
        return hashlib.sha256(json.dumps(counted).encode()).hexdigest()


def take_out_of_hash(vllm_config: VllmConfig) -> None:
    """Has our options hashed by themselves, unless others are beside them."""
    options = vllm_config.additional_config
    if isinstance(options, dict) and options.keys() == {CONFIG_KEY}:
        vllm_config.additional_config = HashedOptions(options)
