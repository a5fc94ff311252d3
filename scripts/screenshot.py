"""Takes the pictures of the web page that docs/web_page.md shows.

    .venv/bin/python scripts/screenshot.py [--url http://localhost:8000] [--out DIR]

Without ``--url`` it serves the real model of ``make demo-chat``. Requests about a long
text are decoding meanwhile: one that reads the text from the prefix cache, and two
samples of another, whose second shares the first's prefill.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("server", "testing", "scripts")]

import browser as finder  # noqa: E402
import demo  # noqa: E402
import demo_chat  # noqa: E402
from playwright.sync_api import Browser, sync_playwright  # noqa: E402

from asl_vllm_testing import real_model  # noqa: E402

BUDGET = 512
MAX_TOKENS = 48
MOST_WAITING_MS = 300_000  # for a server on few cores
LONG_TOKENS = 1200
"""Of the requests beside: enough to be seen in both pictures."""


_TWO_SAMPLES = {"kv_reuse": "read", "n": 2, "temperature": 0.7, "seed": 1}


def prompt_of(text: str, question: str) -> str:
    """A chat of one turn, as the model's template writes it."""
    return f"<|im_start|>user\n{text}\n\n{question}<|im_end|>\n<|im_start|>assistant\n"


def ask(url: str, prompt: str, **fields: Any) -> None:
    """Sends a completion and waits for its end; a server that ends first is fine."""
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    except OSError as error:
        print(f"beside: {error}")


def keep_busy(url: str, text: str) -> None:
    """Starts the requests that the pictures show."""
    document = prompt_of(text, "What may a contributor do?")
    ask(url, document, max_tokens=1)  # leaves the text in the prefix cache
    for question, fields in (
        (demo_chat.QUESTION, {"kv_reuse": "read"}),
        ("Who is the Licensor?", {"kv_policy": "fastkv", **_TWO_SAMPLES}),
    ):
        sent = {"max_tokens": LONG_TOKENS, "kv_budget": BUDGET, **fields}
        threading.Thread(
            target=ask, args=(url, prompt_of(text, question)), kwargs=sent, daemon=True
        ).start()


def picture(browser: Browser, url: str, scheme: str, text: str, target: Path) -> None:
    """Loads the page, runs one comparison and saves a picture of all of it."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(f"{url}/kv")
    page.locator("#state[data-state=live]").wait_for(timeout=MOST_WAITING_MS)
    page.get_by_label("Prompt", exact=True).fill(prompt_of(text, demo_chat.QUESTION))
    page.get_by_label("Budget B").fill(str(BUDGET))
    page.get_by_label("New tokens").fill(str(MAX_TOKENS))
    # One without, whose times compare, and one with.
    page.get_by_label("B may read what A left").set_checked(scheme == "dark")
    page.get_by_role("button", name="Run both").click()
    page.get_by_text("Both answers are here.").wait_for(timeout=MOST_WAITING_MS)
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=target, full_page=True)
    context.close()
    print(target)


def take(url: str, out: Path) -> bool:
    """Takes both pictures of the server at ``url``."""
    text = demo_chat.TEXT.read_text()
    out.mkdir(parents=True, exist_ok=True)
    chromium = finder.find_or_fetch()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            chromium_sandbox=False,  # it refuses to run as root
            env=dict(finder.environment(chromium)),
        )
        keep_busy(url, text)
        for scheme in ("light", "dark"):
            picture(browser, url, scheme, text, out / f"kv_page_{scheme}.png")
        browser.close()
    return True


def main() -> int:
    """Takes the pictures; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; default: the real model's")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    asked = parser.parse_args()

    def run() -> bool:
        if asked.url:
            return take(asked.url, asked.out)
        port = demo.free_port()
        command = demo_chat.serve_command(real_model.fetch(), port)
        command.remove("--no-enable-prefix-caching")
        url = f"http://127.0.0.1:{port}"
        return demo.serve_and_ask(command, url, lambda url: take(url, asked.out))

    return demo.end_of(run, "Taken.", "Not taken.")


if __name__ == "__main__":
    sys.exit(main())
