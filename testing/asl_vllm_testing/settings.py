"""How the servers of the tests are set up."""

from __future__ import annotations

import json

CONFIG = {
    "window": 8,
    "selection_layer": 4,
    "check_integrity": True,
    # Tests send one prompt many times, and count what computing it takes.
    "reuse": "none",
}
BLOCK = 32
LAYERS = 10
POOL_TOKENS = 1000 // BLOCK * BLOCK
STEP_TOKENS = 512

SERVER_OPTIONS = (
    *("--kv-policy", "asl", "--kv-policy-config", json.dumps(CONFIG)),
    *("--num-gpu-blocks-override", str(POOL_TOKENS // BLOCK + 1)),
    # So small that a long prompt's prefill takes several steps and can be watched.
    *("--max-num-batched-tokens", str(STEP_TOKENS)),
)
