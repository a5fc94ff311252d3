"""Takes the pictures of the web page that docs/web_page.md shows.

    .venv/bin/python scripts/screenshot.py [--url http://localhost:8000] [--out DIR]

Without ``--url`` the page is served with the tests' canned answers, so that the
pictures are the same on every machine; with it, a running server is pictured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("server", "testing", "scripts")]

import browser as finder  # noqa: E402
from playwright.sync_api import Browser, sync_playwright  # noqa: E402

from asl_vllm_testing.canned import Canned, serving  # noqa: E402

PROMPT = "the sky is blue . the red key is 7 3 9 1 . the sun is yellow . the red key is"
MOST_WAITING_MS = 120_000  # for a real server's answers


def picture(browser: Browser, url: str, scheme: str, target: Path) -> None:
    """Loads the page, runs one comparison and saves a picture of all of it."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(f"{url}/kv")
    page.locator("#state[data-state=live]").wait_for()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Run both").click()
    page.get_by_text("Both answers are here.").wait_for(timeout=MOST_WAITING_MS)
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=target, full_page=True)
    context.close()
    print(target)


def main() -> None:
    """Takes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; default: canned answers")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chromium = finder.find_or_fetch()
    with contextlib.ExitStack() as stack:
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(
            executable_path=chromium,
            chromium_sandbox=False,  # it refuses to run as root
            env=dict(finder.environment(chromium)),
        )
        stack.callback(browser.close)
        url = arguments.url
        if url is None:
            url = stack.enter_context(serving(Canned())).url
        for scheme in ("light", "dark"):
            target = arguments.out / f"kv_page_{scheme}.png"
            picture(browser, url, scheme, target)


if __name__ == "__main__":
    main()
