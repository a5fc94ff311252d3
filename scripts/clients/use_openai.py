"""openai and anthropic (Python): typed bodies, streams, and many calls at once."""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import Any

import openai

warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)  # of connections at the end
url, *prompts = sys.argv[1:]
ANSWER = ["7", "3", "9", "1"]
chats: list[Any] = [[{"role": "user", "content": text}] for text in prompts]


async def use(client: openai.AsyncOpenAI, extra: dict[str, Any]) -> None:
    """Every kind of call."""
    common: dict[str, Any] = {"model": "small", "extra_body": extra}
    short = {"max_tokens": 4, "temperature": 0, **common}
    made = await asyncio.gather(
        *(
            client.chat.completions.create(messages=chat, **short)
            for chat in chats + chats[::-1]
        )
    )
    assert made[1].choices[0].message.content.split() == ANSWER
    kv_cache = (made[1].usage.model_extra or {}).get("kv_cache")
    assert (kv_cache["pruned_tokens"] if extra else kv_cache) == (
        288 if extra else None
    )
    several = await client.completions.create(
        prompt=prompts, n=2, **{**short, "temperature": 1}
    )
    assert len(several.choices) == 4
    usage: dict[str, Any] = {"stream_options": {"include_usage": True}}
    stream = await client.chat.completions.create(
        messages=chats[1], stream=True, **usage, **short
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert ("kv_cache" in (chunks[-1].usage.model_extra or {})) == bool(extra)
    # The client raises where a streamed message ends by its length.
    async with client.chat.completions.stream(
        messages=chats[1], stop=["1"], **usage, **short
    ) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content.split() == ANSWER[:3]
    asked = {"input": prompts[1], "max_output_tokens": 4, "temperature": 0, **common}
    response = await client.responses.create(**asked)
    assert response.output_text.split() == ANSWER
    async with client.responses.stream(**asked) as events:
        assert (await events.get_final_response()).output_text.split() == ANSWER


async def main() -> None:
    """With a budget, without, and with one in a wrong place."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for extra in ({"kv_budget": 128}, {}):
        await use(client, extra)
    try:
        await use(client, {"extra_body": {"kv_budget": 128}})
    except openai.BadRequestError as error:
        assert error.param == "extra_body", error
    else:
        raise AssertionError("a nested extra_body was not refused")


asyncio.run(main())
