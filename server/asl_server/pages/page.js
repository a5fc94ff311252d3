// The page at /kv. Everything from the server is put in as text, never as markup.
"use strict";

const POLL_MS = 1000;
const SLOWEST_POLL_MS = 10000;
const TIMEOUT_MS = 12000; // above the ten seconds that the server gives its engine
const MOST_REQUESTS = 100;
const KEY = "asl-api-key";

const $ = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const plural = (n, word) => `${whole.format(n)} ${word}${n === 1 ? "" : "s"}`;

/** An element with classes and text. */
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** Sets text only where it differs, so that a selection or a reader is not disturbed. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// --- The server ---

/** Why a request failed, as a sentence. `status` is 0 when there was no answer. */
class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  let response;
  try {
    // Relative to the page, which may lie behind a path prefix.
    response = await fetch(path, {
      ...options,
      headers: { ...authorization(), ...options.headers },
      cache: "no-store",
    });
  } catch (error) {
    if (options.signal?.aborted && options.signal.reason?.name === "AbortError") throw error;
    throw new Failure(0, "The server does not answer.");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Failure(response.status, reasonOf(response.status, body));
  if (body === null || typeof body !== "object") {
    throw new Failure(response.status, "The server’s answer is not JSON.");
  }
  return body;
}

function reasonOf(status, body) {
  const message = body?.error?.message ?? body?.message ?? body?.detail ?? body?.error;
  if (typeof message === "string" && message) return message;
  if (status === 401) return "The server wants an API key.";
  if (status === 404) return "The server has no such route: it runs without a KV policy.";
  if (status >= 500) return `The engine has failed or is not up yet (status ${status}).`;
  return `The server answered with status ${status}.`;
}

// --- State of the page ---

let policies = null;
let paused = false;
let failures = 0;
let timer = 0;

function show(state, text) {
  $("state").dataset.state = state;
  say($("state"), text);
}

function showProblem(failure) {
  if (!failure) {
    $("problem").hidden = true;
    return;
  }
  const wantsKey = failure.status === 401;
  const opened = wantsKey && $("key-form").hidden;
  if (wantsKey) $("key-form").hidden = false;
  if (opened) $("key").focus();
  const refused = wantsKey && sessionStorage.getItem(KEY);
  const text = refused ? "The server refuses this API key." : failure.message;
  say($("problem"), wantsKey ? text : `${text} Trying again.`);
  $("problem").hidden = wantsKey && !refused;
}

async function poll() {
  clearTimeout(timer);
  try {
    const signal = () => AbortSignal.timeout(TIMEOUT_MS);
    if (!policies) {
      policies = await call("v1/kv/policies", { signal: signal() });
      showPolicies(policies);
    }
    const stats = await call("v1/kv/stats", { signal: signal() });
    if (!Array.isArray(stats.engines)) {
      throw new Failure(200, "The server’s answer is not what this page expects.");
    }
    showStats(stats);
    failures = 0;
    showProblem(null);
    $("key-form").hidden = true;
    if (!paused) show("live", "Live");
  } catch (error) {
    const failure = error instanceof Failure ? error : new Failure(-1, `The page failed: ${error.message}.`);
    failures += 1;
    // A server that comes back may have been started otherwise.
    policies = null;
    show("problem", failure.status === 401 ? "Needs a key" : failure.status === 0 ? "No answer" : "Failing");
    showProblem(failure);
    if (failures === 1) markStale();
  }
  // Another call may have ended meanwhile: only one timer is left.
  clearTimeout(timer);
  const delay = Math.min(SLOWEST_POLL_MS, POLL_MS * 2 ** failures);
  if (!paused && !document.hidden) timer = setTimeout(poll, delay);
}

/** Placeholders must not say "Loading" for ever; figures stay, as the last known. */
function markStale() {
  for (const element of document.querySelectorAll(".placeholder")) {
    if (element.textContent === "Loading") say(element, "No figures yet.");
  }
}

// --- Pool ---

function showPolicies(info) {
  const parts = [info.model, `policy ${info.policy}`, info.version && `asl_vllm ${info.version}`];
  say($("server"), parts.filter(Boolean).join(" · "));
  document.title = `KV cache · ${info.model}`;
  const fallback = info.default_budget === null ? "no pruning" : String(info.default_budget);
  say($("budget-note"),
    `Tokens per layer from ${whole.format(info.minimum_budget)}, or a share of the prompt such as 0.25; `
    + `1.0 prunes nothing. Empty is the server’s default: ${fallback}.`);
}

function showStats(stats) {
  const engines = $("engines");
  if (engines.querySelector(".placeholder") || engines.children.length !== stats.engines.length) {
    engines.replaceChildren(...stats.engines.map(makeEngine));
  }
  stats.engines.forEach((engine, i) => updateEngine(engines.children[i], engine, stats.engines.length > 1));

  const totals = stats.totals ?? {};
  const work = (totals.skipped_token_layers ?? 0) + (totals.computed_token_layers ?? 0);
  say($("total-requests"), whole.format(totals.requests ?? 0));
  say($("total-pruned"), whole.format(totals.pruned_tokens ?? 0));
  say($("total-skipped"), work ? percent.format(totals.skipped_token_layers / work) : "–");
  say($("total-reused"), whole.format(totals.reused_tokens ?? 0));
  say($("total-filled"), whole.format(totals.filled_tokens ?? 0));
  say($("total-shared"), whole.format(totals.shared_prefills ?? 0));

  const several = stats.engines.length > 1;
  showRequests(stats.engines.flatMap((engine) =>
    (engine.requests ?? []).map((request) => ({ ...request, engine: several ? engine.index : null }))));
}

function makeEngine() {
  const panel = make("div", "engine panel");
  const top = make("div", "spread");
  top.append(make("p", "in-use"), make("p", "muted blocks"));
  const bar = make("div", "bar");
  bar.setAttribute("role", "meter");
  bar.setAttribute("aria-valuemin", "0");
  bar.setAttribute("aria-valuemax", "100");
  bar.append(make("i", "used"), make("i", "saved"));
  panel.append(top, bar, make("p", "muted saving"));
  return panel;
}

function updateEngine(panel, engine, several) {
  const pool = engine.pool;
  const capacity = pool.blocks_total * pool.block_size;
  const used = capacity ? pool.blocks_used / pool.blocks_total : 0;
  const without = capacity ? used + pool.tokens_saved / capacity : 0;
  const name = several ? `Engine ${engine.index}` : "Pool";
  const inUse = `${percent.format(used)} of ${whole.format(capacity)} tokens in use`;
  say(panel.querySelector(".in-use"), several ? `${name}: ${inUse}` : inUse);
  say(panel.querySelector(".blocks"),
    `${plural(pool.blocks_used, "block")} used, ${whole.format(pool.blocks_free)} free, `
    + `${whole.format(pool.block_size)} tokens each`);
  say(panel.querySelector(".saving"), pool.tokens_saved
    ? `Pruning saves ${plural(pool.tokens_saved, "token")} now; without it ${percent.format(without)} would be needed.`
    : "Pruning saves nothing now.");
  const bar = panel.querySelector(".bar");
  bar.setAttribute("aria-label", `${name} in use`);
  bar.setAttribute("aria-valuenow", (used * 100).toFixed(1));
  bar.setAttribute("aria-valuetext", inUse);
  bar.querySelector(".used").style.width = `${Math.min(1, used) * 100}%`;
  bar.querySelector(".saved").style.width = `${Math.max(0, Math.min(1, without) - used) * 100}%`;
}

// --- Requests ---

function showRequests(requests) {
  const list = $("requests");
  const shown = requests.slice(0, MOST_REQUESTS);
  const keyOf = (request) => `${request.engine ?? ""}/${request.request_id}`;
  const before = new Map([...list.children].map((item) => [item.dataset.key, item]));
  // Items are kept from poll to poll, and moved only where the order changed.
  shown.forEach((request, i) => {
    const item = before.get(keyOf(request)) ?? makeRequest(keyOf(request));
    before.delete(keyOf(request));
    updateRequest(item, request);
    if (list.children[i] !== item) list.insertBefore(item, list.children[i] ?? null);
  });
  for (const item of before.values()) item.remove();
  say($("count"), requests.length ? whole.format(requests.length) : "");
  const more = requests.length - shown.length;
  say($("no-requests"), more ? `And ${plural(more, "request")} more.`
    : requests.length ? "" : "None now.");
}

function makeRequest(key) {
  const item = make("li", "panel");
  item.dataset.key = key;
  const top = make("div", "spread");
  top.append(make("p", "id"), make("p", "muted tokens"));
  const layers = make("div", "layers");
  layers.setAttribute("role", "img");
  item.append(top, layers, make("p", "muted progress"));
  return item;
}

function updateRequest(item, request) {
  const prompt = request.num_prompt_tokens;
  const kept = request.kept_tokens;
  const total = request.num_layers;
  const selection = request.selection_layer;
  const engine = request.engine === null ? "" : ` · engine ${request.engine}`;
  say(item.querySelector(".id"), request.request_id);
  say(item.querySelector(".tokens"),
    `${whole.format(kept)} of ${plural(prompt, "token")} kept · budget ${request.budget} · ${request.policy}${engine}`);

  const layers = item.querySelector(".layers");
  while (layers.children.length < total) layers.append(make("i", "cell todo"));
  while (layers.children.length > total) layers.lastChild.remove();
  const share = prompt ? kept / prompt : 1;
  [...layers.children].forEach((cell, layer) => {
    const done = layer < request.layer;
    const deeper = selection !== null && layer > selection;
    cell.className = `cell ${!done ? "todo" : layer === selection ? "selected" : deeper ? "kept" : "full"}`;
    cell.style.height = done && deeper ? `${Math.max(20, share * 100)}%` : "";
  });

  const progress = request.state === "waiting" ? "Waiting"
    : request.layer >= total ? `Prefilled, ${request.state}`
      : `Prefilling, ${request.layer} of ${total} layers done`;
  const chosen = selection !== null ? `tokens selected at layer ${selection}`
    : request.layer >= total ? "no selection, each layer kept its own" : "not selected yet";
  const reused = request.reused_tokens ? ` · ${plural(request.reused_tokens, "token")} read from the prefix cache` : "";
  const text = `${progress} · ${chosen}${reused} · ${plural(request.blocks_held, "block")} held`;
  say(item.querySelector(".progress"), text);
  layers.setAttribute("aria-label", `${request.layer} of ${total} layers done, ${chosen}`);
}

// --- Comparison ---

let running = null;

/** A budget as JSON text, or null if it is none. Text, because 1.0 must not become 1. */
function budgetText(typed) {
  const text = typed.trim();
  if (text === "") return "null";
  if (/^[1-9]\d*$/.test(text)) return text;
  const share = /^(0?\.\d+|1\.0+)$/.test(text) && Number(text) > 0;
  return share ? text.replace(/^\./, "0.") : null;
}

function complain(field, message) {
  field.setAttribute("aria-invalid", "true");
  field.focus();
  $("compare-state").classList.add("error");
  say($("compare-state"), message);
}

function readForm() {
  $("compare-state").classList.remove("error");
  for (const field of $("compare").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  if (!$("prompt").value.trim()) return complain($("prompt"), "The prompt is empty.");
  const budgets = [];
  for (const side of ["a", "b"]) {
    const text = budgetText($(`budget-${side}`).value);
    if (text === null) {
      return complain($(`budget-${side}`),
        `Budget ${side.toUpperCase()}: a whole number of tokens, a share from 0.01 to 1.0, or nothing.`);
    }
    budgets.push(text);
  }
  const maxTokens = Number($("max-tokens").value);
  if (!Number.isInteger(maxTokens) || maxTokens < 1 || maxTokens > 4096) {
    return complain($("max-tokens"), "New tokens: 1 to 4096.");
  }
  const reuse = $("reuse").checked;
  return { prompt: $("prompt").value, budgets, maxTokens, reuse, salts: [newSalt(), newSalt()] };
}

/** Prefixes are cached apart for each: those of others would spoil the times. */
function newSalt() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("");
}

function bodyOf({ prompt, maxTokens, reuse, salts }, budget, i) {
  const fields = {
    prompt,
    max_tokens: maxTokens,
    temperature: 0,
    cache_salt: salts[reuse ? 0 : i],
  };
  if (reuse) fields.kv_reuse = "read";
  if (policies?.model) fields.model = policies.model;
  return `${JSON.stringify(fields).slice(0, -1)},"kv_budget":${budget}}`;
}

async function compare(event) {
  event.preventDefault();
  if (running) return;
  const form = readForm();
  if (!form) return;
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  const outcomes = [];
  for (const [i, side] of ["a", "b"].entries()) {
    say($("compare-state"), `Running ${side.toUpperCase()}, ${i + 1} of 2`);
    const panel = $(`result-${side}`);
    startResult(panel, side, form.budgets[i]);
    outcomes.push(await runOne(panel, form, form.budgets[i], i));
    if (outcomes.at(-1) === "stopped") break;
  }
  const word = outcomes.includes("stopped") ? "Stopped."
    : outcomes.includes("failed") ? "Done, with an error." : "Both answers are here.";
  running = null;
  $("run").disabled = false;
  $("stop").disabled = true;
  say($("compare-state"), word);
}

function startResult(panel, side, budget) {
  const title = make("h3", "", `${side.toUpperCase()}: ${budget === "null" ? "server’s default" : `budget ${budget}`}`);
  title.id = `title-${side}`;
  const answer = make("p", "answer", "…");
  // It scrolls when long, so the keyboard must reach it, and it needs a name.
  answer.tabIndex = 0;
  answer.setAttribute("role", "group");
  answer.setAttribute("aria-label", `Answer ${side.toUpperCase()}`);
  panel.replaceChildren(title, answer);
  panel.hidden = false;
}

async function runOne(panel, form, budget, i) {
  const started = performance.now();
  const answer = panel.querySelector(".answer");
  try {
    const reply = await call("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: bodyOf(form, budget, i),
      signal: running.signal,
    });
    const seconds = (performance.now() - started) / 1000;
    answer.textContent = reply.choices?.[0]?.text ?? "";
    panel.append(factsOf(reply, seconds));
    return "answered";
  } catch (error) {
    const stopped = error.name === "AbortError";
    answer.classList.toggle("error", !stopped);
    answer.textContent = stopped ? "Stopped." : error.message;
    return stopped ? "stopped" : "failed";
  }
}

function factsOf(reply, seconds) {
  const usage = reply.usage ?? {};
  // Without a budget the reply says nothing of it, and all of the prompt is kept.
  const cache = usage.kv_cache ?? { kept_tokens: usage.prompt_tokens, freed_blocks: 0, skipped_token_layers: 0 };
  const count = (value) => (value === undefined || value === null ? "–" : whole.format(value));
  const list = make("dl", "facts");
  const rows = [
    ["Time", `${seconds.toFixed(2)} s`],
    ["Prompt tokens", count(usage.prompt_tokens)],
    ["Kept per layer", count(cache.kept_tokens)],
    ["Freed blocks", count(cache.freed_blocks)],
    ["Selection layer", cache.selection_layer ?? "none"],
    ["Token-layers skipped", count(cache.skipped_token_layers)],
    ["Read from prefix cache", count(cache.reused_tokens ?? 0)],
    ["Filled there first", count(cache.filled_tokens ?? 0)],
    ["Policy", reply.kv_transfer_params?.policy ?? "none"],
  ];
  for (const [name, value] of rows) {
    list.append(make("dt", "", name), make("dd", "", String(value)));
  }
  return list;
}

// --- Start ---

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) {
    clearTimeout(timer);
    show("paused", "Paused");
  } else {
    poll();
  }
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  failures = 0;
  poll();
});
$("compare").addEventListener("submit", compare);
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused) poll();
});
poll();
