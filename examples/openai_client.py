"""A question about a long document under a KV-cache budget, with OpenAI's client."""

import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = OpenAI(base_url=url, api_key="none")
model = client.models.list().data[0].id
document = Path(__file__).with_name("document.txt").read_text()

reply = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": document + "question : the red key is"}],
    max_tokens=4,
    temperature=0,
    # Fields that OpenAI does not have go through extra_body.
    extra_body={"kv_budget": 256},
)
print("answer:", reply.choices[0].message.content.strip())
usage = reply.usage
print(f"kept {usage.kv_cache['kept_tokens']} of {usage.prompt_tokens} tokens a layer")
