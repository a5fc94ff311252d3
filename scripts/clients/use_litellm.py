"""litellm: its two ways to reach a vLLM server, batches, streams and text."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import litellm

url, *prompts = sys.argv[1:]
ANSWER = ["7", "3", "9", "1"]


def asked(provider: str, budget: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What calls have in common."""
    return {
        "model": f"{provider}/small",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "max_tokens": 4,
        "temperature": 0,
        **budget,
        **more,
    }


def messages(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


async def at_once(calls: list[dict[str, Any]]) -> list[Any]:
    """Calls side by side."""
    return await asyncio.gather(*(litellm.acompletion(**call) for call in calls))


def pruned(usage: Any) -> int | None:
    """What usage says; None: nothing."""
    kv_cache = usage.model_dump().get("kv_cache")
    return kv_cache and kv_cache["pruned_tokens"]


for provider in ("openai", "hosted_vllm"):
    for budget, expected in (
        ({"extra_body": {"kv_budget": 128}}, 288),
        ({"kv_budget": 128}, 288),
        ({}, None),
    ):
        call = asked(provider, budget)
        chats = [messages(text) for text in prompts]
        for batch in (chats, chats[::-1]):
            made = litellm.batch_completion(messages=batch, **call)
            assert not [m for m in made if isinstance(m, Exception)], made
            assert sorted(m.choices[0].message.content.split() == ANSWER for m in made)[
                1
            ]
            assert {pruned(m.usage) for m in made} <= {
                expected,
                0 if expected else None,
            }
        made = asyncio.run(at_once([{**call, "messages": chat} for chat in chats]))
        assert pruned(made[1].usage) == expected, made[1].usage
        chunks = list(
            litellm.completion(
                messages=chats[1],
                stream=True,
                stream_options={"include_usage": True},
                **call,
            )
        )
        whole = litellm.stream_chunk_builder(chunks, messages=chats[1])
        assert whole.choices[0].message.content.split() == ANSWER
        assert whole.usage.completion_tokens == 4
    text = asked(
        "text-completion-openai" if provider == "openai" else provider,
        {"extra_body": {"kv_budget": 128}},
    )
    made = litellm.text_completion(prompt=prompts[1], **text)
    assert made.choices[0].text.split() == ANSWER
