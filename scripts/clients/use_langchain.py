"""langchain-openai: batches add ``usage`` up key by key, in either order."""

from __future__ import annotations

import asyncio
import sys
import warnings

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

url, *prompts = sys.argv[1:]
warnings.simplefilter("error")
# Of asyncio's at the end; what usage leads to is a UserWarning.
warnings.simplefilter("ignore", ResourceWarning)
SERVER = {"model": "small", "base_url": f"{url}/v1", "api_key": "none"}
SHORT = {**SERVER, "max_tokens": 4, "temperature": 0}
BUDGETS = ({"kv_budget": 128}, {"kv_policy": "none"})
ANSWER = ["7", "3", "9", "1"]

for budget in BUDGETS:
    pruning = "kv_budget" in budget
    model = ChatOpenAI(**SHORT, extra_body=budget, stream_usage=True)
    for texts in (prompts, prompts[::-1]):
        made = model.generate([[HumanMessage(text)] for text in texts])
        usage = made.llm_output["token_usage"]
        assert ("kv_cache" in usage) == pruning, usage
        if pruning:
            assert usage["kv_cache"]["budget_tokens"] == 256, usage
            assert usage["kv_cache"]["pruned_tokens"] == 288, usage
        assert len(model.batch(texts)) == len(texts)
    whole = None
    for chunk in model.stream(prompts[1]):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.usage_metadata["output_tokens"] == 4
    assert whole.text.split() == ANSWER, whole.text
    responses = ChatOpenAI(**SHORT, extra_body=budget, use_responses_api=True)
    assert responses.batch(prompts)[1].text.split() == ANSWER
    # A prompt a call, whose usage is added up, and all prompts in one call.
    for size in (1, 2):
        made = OpenAI(**SHORT, extra_body=budget, batch_size=size).generate(prompts)
        assert made.generations[1][0].text.split() == ANSWER


async def side_by_side() -> None:
    """In one event loop, as its connections need."""
    for budget in BUDGETS:
        model = ChatOpenAI(**SHORT, extra_body=budget)
        replies = await model.abatch(prompts * 2)
        assert replies[3].text.split() == ANSWER
        await model.agenerate([[HumanMessage(text)] for text in prompts])


asyncio.run(side_by_side())
