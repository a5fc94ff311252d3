"""One canned server and one browser for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asl_vllm_testing import scripts
from asl_vllm_testing.canned import Canned, serving


@pytest.fixture(scope="session")
def canned_server() -> Iterator[Canned]:
    with serving(Canned()) as canned:
        yield canned


@pytest.fixture
def canned(canned_server: Canned) -> Canned:
    canned_server.reset()
    return canned_server


# Not for the session: while Playwright runs, its event loop is the thread's, and later
# tests could run none of their own.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; without one the tests are skipped and say why."""
    from playwright.sync_api import sync_playwright

    finder = scripts.load("browser")
    try:
        chromium = finder.find_or_fetch()
    except finder.NoBrowserError as error:
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            # Chromium's sandbox refuses to run as root, and the pages are our own.
            chromium_sandbox=False,
            env=finder.environment(chromium),
        )
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(5000)
    # The page's timers run ten times as fast.
    context.add_init_script(
        "{ const set = setTimeout; "
        "window.setTimeout = (call, ms) => set(call, ms / 10); }"
    )
    yield context
    context.close()


@pytest.fixture
def page(context, canned):
    """The page, loaded; a test fails when the page logs an error of its own."""
    errors: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        # What a failing request logs is part of some tests.
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and "Failed to load" not in message.text
            else None
        ),
    )
    page.goto(f"{canned.url}/kv")
    yield page
    assert errors == []
