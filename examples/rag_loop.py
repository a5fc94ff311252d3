"""Many questions about one document: it is computed once, then read and pruned.

The first call has no budget, so vLLM puts the document into its prefix cache. Each
question's call reads it there and keeps ``kv_budget`` tokens of it.
Needs a server with prefix caching on, which is vLLM's default on GPUs.
"""

import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = OpenAI(base_url=url, api_key="none")
model = client.models.list().data[0].id
document = Path(__file__).with_name("document.txt").read_text()

client.completions.create(model=model, prompt=document, max_tokens=1)

for color in ("red", "silver", "gold"):
    reply = client.completions.create(
        model=model,
        # The document first: what two prompts share must be their beginning.
        prompt=document + f"question : the {color} key is",
        max_tokens=4,
        temperature=0,
        extra_body={"kv_budget": 256},
    )
    cache = reply.usage.kv_cache
    print(
        f"{color}: {reply.choices[0].text.strip()} "
        f"(read {cache['reused_tokens']} of {reply.usage.prompt_tokens} tokens, "
        f"kept {cache['kept_tokens']})"
    )
