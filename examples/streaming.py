"""A streamed answer under a KV-cache budget; the last chunk says what was kept."""

import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = OpenAI(base_url=url, api_key="none")
model = client.models.list().data[0].id
document = Path(__file__).with_name("document.txt").read_text()

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": document + "question : the silver key is"}],
    max_tokens=4,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},  # without it a stream has no usage
    extra_body={"kv_budget": 0.25},  # a share of the prompt
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        kept = chunk.usage.kv_cache["kept_tokens"]
        print(f"\nkept {kept} of {chunk.usage.prompt_tokens} tokens a layer")
