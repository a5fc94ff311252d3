"""anthropic (Python): messages and streams."""

from __future__ import annotations

import sys
import warnings

import anthropic

warnings.simplefilter("error")
url, *prompts = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
for extra in ({"kv_budget": 128}, {}):
    asked = {
        "model": "small",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": prompts[1]}],
        "extra_body": {"temperature": 0, **extra},
    }
    made = client.messages.create(**asked)
    assert made.content[0].text.split() == ["7", "3", "9", "1"]
    assert ("kv_cache" in (made.usage.model_extra or {})) == bool(extra)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert final.content[0].text.split() == ["7", "3", "9", "1"]
