// A question under a KV-cache budget from JavaScript, without any package.
import { readFile } from "node:fs/promises";

const url = process.argv[2] ?? "http://localhost:8000/v1";
const model = (await (await fetch(`${url}/models`)).json()).data[0].id;
const text = await readFile(new URL("document.txt", import.meta.url), "utf8");

const response = await fetch(`${url}/chat/completions`, {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({
    model,
    messages: [{ role: "user", content: `${text}question : the gold key is` }],
    max_tokens: 4,
    temperature: 0,
    // Tokens. A share of the prompt must not be a whole number: JavaScript writes 1.0 as 1.
    kv_budget: 256,
  }),
});
const reply = await response.json();
if (!response.ok) throw new Error(reply.error.message);
console.log("answer:", reply.choices[0].message.content.trim());
console.log("kept:", reply.usage.kv_cache.kept_tokens, "of", reply.usage.prompt_tokens);
console.log("policy:", response.headers.get("x-kv-policy"));
