"""A server with a policy that a package of another's adds (docs/policies.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from asl_vllm_testing import policy_package
from asl_vllm_testing.server import serve

PROMPT = [4 + i % 200 for i in range(500)]


def test_the_guides_policy_is_served(tmp_path: Path) -> None:
    package = policy_package.install(tmp_path)
    path = os.pathsep.join([str(package), *filter(None, sys.path)])
    options = ("--kv-policy", "newest", "--kv-policy-config", '{"window": 8}')
    with serve(tmp_path / "log", *options, PYTHONPATH=path) as server:
        offered = server.http.get("/v1/kv/policies").json()
        assert offered["policy"] == offered["policies"][-1] == "newest"

        def ask(**fields: object) -> dict[str, Any]:
            body = {"prompt": PROMPT, "max_tokens": 4, "kv_budget": 96, **fields}
            reply = server.post("/v1/completions", **body)
            assert reply.status_code == 200, reply.text
            told: dict[str, Any] = reply.json()["kv_transfer_params"]
            return told

        mine = ask()
        assert (mine["policy"], mine["selection_layer"]) == ("newest", 1)
        assert mine["kept_tokens"] == 84  # of 500, without 13 blocks of 32
        theirs = ask(kv_policy="snapkv")
        assert (theirs["policy"], theirs["selection_layer"]) == ("snapkv", None)
