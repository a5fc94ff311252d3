"""The page in a headless Chromium, against canned answers."""

from __future__ import annotations

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from asl_vllm import __version__
from asl_vllm_testing import canned as answers

NASTY = "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


def state(page, text: str, timeout: float = 5000) -> None:
    expect(page.locator("#state")).to_have_text(text, timeout=timeout)


def run_both(page, a: str, b: str, prompt: str = "the red key is") -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Budget A").fill(a)
    page.get_by_label("Budget B").fill(b)
    page.get_by_role("button", name="Run both").click()


# --- Live figures ---


def test_pool_and_totals(page) -> None:
    state(page, "Live")
    expect(page.locator("#server")).to_have_text(
        f"canned-8b · policy asl · asl_vllm {__version__}"
    )
    meter = page.get_by_role("meter", name="Pool in use")
    assert meter.get_attribute("aria-valuenow") == "21.5"  # 1412 of 6553 blocks
    expect(page.locator(".in-use")).to_have_text("21.5% of 209,696 tokens in use")
    # 30,720 of 32,768 twice and 59,008 of 65,536; what waits holds nothing.
    expect(page.locator(".saving")).to_contain_text("saves 120,448 tokens now")
    expect(page.locator("#total-requests")).to_have_text("1,284")
    # 691,421,184 of 1,232,355,328 token-layers
    expect(page.locator("#total-skipped")).to_have_text("56.1%")
    expect(page.locator("#total-reused")).to_have_text("9,437,184")
    expect(page.locator("#total-filled")).to_have_text("4,096")
    expect(page.locator("#total-shared")).to_have_text("96")


def test_bars_are_as_wide_as_the_figures_say(page) -> None:
    state(page, "Live")
    page.wait_for_timeout(400)  # the bar moves for 0.3 s
    widths = page.evaluate(
        "['.bar', '.bar .used', '.bar .saved'].map("
        "(s) => document.querySelector(s).getBoundingClientRect().width)"
    )
    assert widths[1] / widths[0] == pytest.approx(1412 / 6553, abs=0.005)
    assert widths[2] / widths[0] == pytest.approx(120448 / 209696, abs=0.005)


def test_a_request_shows_its_layers_and_selection_layer(page) -> None:
    item = page.get_by_role("listitem").filter(has_text="chatcmpl-b3a64e1d57f2-0")
    expect(item.locator(".progress")).to_have_text(
        "Prefilling, 21 of 32 layers done · tokens selected at layer 15"
        " · 64 blocks held"
    )
    classes = item.locator(".cell").evaluate_all("(c) => c.map((e) => e.className)")
    kinds = [name.removeprefix("cell ") for name in classes]
    assert kinds == ["full"] * 15 + ["selected"] + ["kept"] * 5 + ["todo"] * 11
    heights = item.locator(".cell").evaluate_all("(c) => c.map((e) => e.offsetHeight)")
    assert heights[20] < heights[0] == heights[15] == heights[31]
    expect(
        page.get_by_role(
            "img", name="21 of 32 layers done, tokens selected at layer 15"
        )
    ).to_be_visible()


def test_a_request_shows_what_it_read_from_the_prefix_cache(page) -> None:
    items = page.locator("#requests .progress")
    expect(items.first).to_have_text(
        "Prefilled, decoding · tokens selected at layer 13"
        " · 24,576 tokens read from the prefix cache · 71 blocks held"
    )
    expect(items.nth(1)).not_to_contain_text("prefix cache")


def test_figures_follow_the_server(page, canned) -> None:
    state(page, "Live")
    expect(page.locator("#requests li")).to_have_count(4)
    moved = answers.request("cmpl-new", layer=3)
    canned.stats = {
        "engines": [answers.engine(0, [moved], 6553)],
        "totals": answers.TOTALS,
    }
    expect(page.locator("#requests li")).to_have_count(1)
    expect(page.locator(".in-use")).to_contain_text("100%")
    canned.stats = answers.IDLE
    expect(page.locator("#no-requests")).to_have_text("None now.")
    expect(page.locator(".saving")).to_have_text("Pruning saves nothing now.")
    expect(page.locator("#total-skipped")).to_have_text("\N{EN DASH}")


def test_several_engines_and_many_requests(page, canned) -> None:
    many = [answers.request(f"cmpl-{i}") for i in range(130)]
    canned.stats = {
        "engines": [answers.engine(0, many, 100), answers.engine(1, [], 7)],
        "totals": answers.TOTALS,
    }
    expect(page.get_by_role("meter")).to_have_count(2)
    expect(page.get_by_role("meter", name="Engine 1 in use")).to_be_visible()
    expect(page.locator("#requests li")).to_have_count(100)
    expect(page.locator("#no-requests")).to_have_text("And 30 requests more.")
    expect(page.locator("#requests li").first).to_contain_text("engine 0")


def test_pausing_stops_asking(page, canned) -> None:
    state(page, "Live")
    pause = page.get_by_role("button", name="Pause")
    pause.click()
    state(page, "Paused")
    assert pause.get_attribute("aria-pressed") == "true"
    page.wait_for_timeout(100)  # one that was under way may end
    polls = canned.polls
    page.wait_for_timeout(400)  # the next would come after 100 ms
    assert canned.polls == polls
    pause.click()
    state(page, "Live")
    assert canned.polls > polls


# --- When things go wrong ---


def test_a_failing_engine_is_reported_and_recovery_noticed(page, canned) -> None:
    state(page, "Live")
    canned.status = 503
    state(page, "Failing")
    expect(page.get_by_role("alert")).to_contain_text("status 503")
    # The last known figures stay.
    expect(page.locator(".in-use")).to_contain_text("21.5%")
    canned.status = 200
    state(page, "Live", timeout=10000)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_dead_server_is_reported(page, context) -> None:
    state(page, "Live")
    context.set_offline(True)
    state(page, "No answer")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_a_server_without_a_policy_is_explained(page, canned) -> None:
    canned.status = 404
    expect(page.get_by_role("alert")).to_contain_text("runs without a KV policy")


def test_an_answer_of_another_shape_is_reported(page, canned) -> None:
    canned.stats = {"engines": "none"}
    expect(page.get_by_role("alert")).to_contain_text("not what this page expects")


def test_an_api_key_is_asked_for_and_kept_for_the_tab_only(
    browser, canned, context
) -> None:
    canned.api_key = "sesame"
    page = context.new_page()
    page.goto(f"{canned.url}/kv")
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(page.locator("#engines")).to_have_text("No figures yet.")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server refuses this API key.")
    field.fill("sesame")
    page.keyboard.press("Enter")
    state(page, "Live")
    expect(field).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    run_both(page, "", "512")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert "sesame" not in page.content() + page.url


# --- The comparison ---


def test_two_budgets_side_by_side(page, canned) -> None:
    state(page, "Live")
    canned.delay = 0.3
    run_both(page, "", "512")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")
    a, b = page.get_by_role("article").all()
    expect(a).to_contain_text("A: server\N{RIGHT SINGLE QUOTATION MARK}s default")
    expect(a.locator(".answer")).to_have_text("7 3 9 1 .")
    facts = b.locator(".facts dd").all_inner_texts()
    assert facts[1:] == ["2,008", "472", "48", "13", "27,648", "1,024", "0", "asl"]
    assert a.locator(".facts dd").nth(6).inner_text() == "0"
    assert re.fullmatch(r"\d\.\d\d s", facts[0])
    first, second = (json.loads(body) for body in canned.bodies)
    assert (first["kv_budget"], second["kv_budget"]) == (None, 512)
    for body in (first, second):
        assert body["model"] == "canned-8b"
        assert body["prompt"] == "the red key is"
        assert (body["max_tokens"], body["temperature"]) == (32, 0)
        assert "kv_reuse" not in body
    assert first["cache_salt"] != second["cache_salt"]


def test_the_second_may_read_what_the_first_left(page, canned) -> None:
    state(page, "Live")
    page.get_by_label("B may read what A left").check()
    run_both(page, "", "512")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")
    first, second = (json.loads(body) for body in canned.bodies)
    assert first["kv_reuse"] == second["kv_reuse"] == "read"
    assert first["cache_salt"] == second["cache_salt"]


def test_one_point_zero_is_sent_as_it_was_typed(page, canned) -> None:
    state(page, "Live")
    run_both(page, "1.0", ".5")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")
    assert [body.rpartition(":")[2] for body in canned.bodies] == ["1.0}", "0.5}"]


def test_only_budgets_are_sent(page, canned) -> None:
    state(page, "Live")
    field = page.get_by_label("Budget B")
    for typed in ("a lot", "-5", "0", "0.0", "1.5", "1e3", "٣", "5, 6"):
        run_both(page, "", typed)
        expect(field).to_be_focused()
        assert field.get_attribute("aria-invalid") == "true"
        expect(page.locator("#compare-state")).to_contain_text("Budget B")
    assert canned.bodies == []
    # A number of tokens is for the server to judge.
    run_both(page, "", "2")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")
    assert field.get_attribute("aria-invalid") is None


def test_a_refusal_is_shown_beside_the_other_answer(page) -> None:
    state(page, "Live")
    run_both(page, "16", "512")
    expect(page.locator("#compare-state")).to_have_text("Done, with an error.")
    expect(page.locator("#result-a .answer")).to_have_text(
        "kv_budget: got 16; allowed: at least 64."
    )
    expect(page.locator("#result-b .answer")).to_have_text("7 3 9 1 .")


def test_a_run_can_be_stopped(page, canned) -> None:
    state(page, "Live")
    canned.delay = 5
    run_both(page, "", "512")
    stop = page.get_by_role("button", name="Stop")
    expect(page.get_by_role("button", name="Run both")).to_be_disabled()
    stop.click()
    expect(page.locator("#compare-state")).to_have_text("Stopped.")
    expect(page.locator("#result-b")).to_be_hidden()
    expect(stop).to_be_disabled()
    assert len(canned.bodies) == 1


def test_text_of_the_server_stays_text(page, canned) -> None:
    canned.policies["model"] = NASTY
    canned.text = NASTY
    canned.stats = {
        "engines": [answers.engine(0, [answers.request(NASTY, policy=NASTY)], 1)],
        "totals": answers.TOTALS,
    }
    page.reload()
    expect(page.locator("#requests .id")).to_have_text(NASTY)
    run_both(page, "", "512", prompt=NASTY)
    expect(page.locator("#result-a .answer")).to_have_text(NASTY)
    assert page.locator("img, b").count() == 0
    assert page.title() != "owned"


# --- For everybody ---


def test_no_accessibility_violations(page) -> None:
    """axe-core's rules, contrast among them, in both colour schemes."""
    state(page, "Live")
    run_both(page, "16", "512")
    expect(page.locator("#result-b .facts")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]})
        assert found.violations_count == 0, found.generate_report()


def test_dark_mode_is_dark(page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert light == "rgb(246, 247, 249)"
    assert page.evaluate(ground) == "rgb(20, 23, 28)"


def test_the_keyboard_reaches_everything_in_order(page) -> None:
    state(page, "Live")
    page.reload()
    state(page, "Live")
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className"
            )
        )
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) != "none"
    assert reached == [
        *("skip", "pause", "prompt", "budget-a", "budget-b", "max-tokens", "run"),
        "reuse",
    ]


def test_enter_in_a_budget_runs_both(page) -> None:
    state(page, "Live")
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_label("Budget B").press("Enter")
    expect(page.locator("#compare-state")).to_have_text("Both answers are here.")


def test_narrow_screens_need_no_scrolling_sideways(page) -> None:
    state(page, "Live")
    run_both(page, "", "512")
    expect(page.locator("#result-b .facts")).to_be_visible()
    for width in (320, 700, 1100):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
