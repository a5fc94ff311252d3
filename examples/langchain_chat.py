"""KV-cache budgets in LangChain, for one question and for a batch of them."""

import sys
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
name = OpenAI(base_url=url, api_key="none").models.list().data[0].id
document = Path(__file__).with_name("document.txt").read_text()

model = ChatOpenAI(
    base_url=url,
    api_key="none",
    model=name,
    temperature=0,
    max_tokens=4,
    extra_body={"kv_budget": 256},
)
prompt = ChatPromptTemplate([("user", "{document}question : the {color} key is")])
chain = prompt | model

reply = chain.invoke({"document": document, "color": "red"})
print("red:", reply.content.strip())
print("proof:", reply.response_metadata["token_usage"]["kv_cache"])

colors = ["silver", "gold"]
replies = chain.batch([{"document": document, "color": color} for color in colors])
for color, reply in zip(colors, replies, strict=True):
    print(f"{color}:", reply.content.strip())
