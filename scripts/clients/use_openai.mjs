// openai (npm): bodies, streams, and many calls at once. JavaScript's 1.0 is 1.
import assert from "node:assert";
import { createRequire } from "node:module";

const OpenAI = createRequire(`${process.cwd()}/`)("openai");
const [url, ...prompts] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const answer = "7 3 9 1";

for (const extra of [{ kv_budget: 128 }, {}]) {
  const pruned = extra.kv_budget ? 288 : undefined;
  const common = { model: "small", temperature: 0, ...extra };
  const asked = (text) => ({ messages: [{ role: "user", content: text }], max_tokens: 4, ...common });
  const made = await Promise.all([...prompts, ...prompts].map((t) => client.chat.completions.create(asked(t))));
  assert.equal(made[1].choices[0].message.content.trim(), answer);
  assert.equal(made[1].usage.kv_cache?.pruned_tokens, pruned);
  const several = await client.completions.create({ prompt: prompts, n: 2, max_tokens: 4, ...common, temperature: 1 });
  assert.equal(several.choices.length, 4);
  const usage = { stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create({ ...asked(prompts[1]), stream: true, ...usage }))
    chunks.push(chunk);
  assert.equal(chunks.at(-1).usage.kv_cache?.pruned_tokens, pruned);
  const runner = client.chat.completions.stream({ ...asked(prompts[1]), ...usage });
  assert.equal((await runner.finalContent()).trim(), answer);
  assert.equal((await runner.totalUsage()).completion_tokens, 4);
  const response = await client.responses.create({ input: prompts[1], max_output_tokens: 4, ...common });
  assert.equal(response.output_text.trim(), answer);
  const events = client.responses.stream({ input: prompts[1], max_output_tokens: 4, ...common });
  assert.equal((await events.finalResponse()).output_text.trim(), answer);
}
await assert.rejects(
  client.completions.create({ model: "small", prompt: prompts[1], kv_budget: 1.0 }),
  (error) => error.status === 400 && error.param === "kv_budget",
);
