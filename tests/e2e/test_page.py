"""The page of the admin port as a person has it: in a browser, beside a robot at work."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.instructions import SUBTASKS
from tests.e2e.browser import WIDTHS, chromium, missing
from tests.e2e.table_robot import Table, at_the_table

if reason := missing():
    pytest.skip(f"the page is not looked at: {reason}", allow_module_level=True)

from playwright.sync_api import Browser, BrowserContext, Page, expect

CONTROL_S = 0.01
KEY = "correct horse"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def table() -> Iterator[Table]:
    with at_the_table("robot-1", control_s=CONTROL_S) as running:
        yield running


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens pages; at the end none of them may have logged an error, failed to load anything or asked anybody else for it."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def opening(url: str, *, refused: bool = False, **options: Any) -> Page:
        def logged(message: Any) -> None:
            # Of a refusal that a test provokes the browser itself says so.
            if message.type == "error" and not (refused and "the server responded with a status of 4" in message.text):
                problems.append(message.text)

        def failed(request: Any) -> None:
            if "ERR_ABORTED" not in request.failure:  # what was under way when the test was over
                problems.append(f"{request.url}: {request.failure}")

        contexts.append(browser.new_context(**{"viewport": WIDTHS["desktop"], **options}))
        page: Page = contexts[-1].new_page()
        page.on("console", logged)
        page.on("requestfailed", failed)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((url, "blob:" + url)) else problems.append(f"asks {request.url}"))
        page.goto(url)
        return page

    yield opening
    for context in contexts:
        context.close()
    assert problems == []


def settled(page: Page) -> Page:
    """The page with something in each of its parts."""
    expect(page.locator("#link")).to_have_text("Live")
    page.wait_for_selector("#cameras img[data-version]")
    page.wait_for_selector("#plots svg")
    page.wait_for_selector("#timeline .entry")
    page.wait_for_selector("#action_prompt_template-preview .said")
    return page


def test_it_shows_what_a_robot_sees_is_told_and_does(table: Table, opened: Open) -> None:
    page = settled(opened(table.url))
    expect(page.locator("#robot-name")).to_have_text("robot-1")
    expect(page.get_by_role("button", name="robot-1")).to_have_attribute("aria-current", "true")
    image = page.get_by_alt_text("What base_0_rgb of robot-1 sees")
    first = image.get_attribute("data-version")
    page.wait_for_function("before => document.querySelector('#cameras img').dataset.version !== before", arg=first)
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [224, 224]
    expect(page.locator("#timeline .entry .words").first).to_have_text(re.compile("|".join(SUBTASKS)))
    page.wait_for_function("document.querySelectorAll('#timeline .entry').length >= 2")
    assert page.locator("#plots .plot").count() == 3 and page.locator("#plots .state-dot").count() > 3
    expect(page.locator("#latency tr").first).to_contain_text("Whole request")
    expect(page.locator("#slots")).to_contain_text("planner ready")


def test_a_template_edit_takes_effect_and_a_refused_one_says_why(table: Table, opened: Open) -> None:
    page = settled(opened(table.url, refused=True))
    template, apply = page.get_by_label(re.compile("Action prompt")), page.get_by_role("button", name="Apply")
    expect(apply).to_be_disabled()
    template.fill("only {task}")
    problem = page.locator("#action_prompt_template-problem")
    expect(problem).to_have_text("has no {subtask}; put it where that text belongs")  # the preview says so already
    apply.click()
    expect(template).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#revision")).to_have_text("revision 1 is in force")

    template.fill("now: {subtask}")
    expect(problem).to_be_hidden()
    expect(page.locator("#action_prompt_template-preview .said")).to_have_text(re.compile("^now: "))
    expect(page.locator("#action_prompt_template-preview")).to_contain_text("of 200 tokens")
    apply.click()
    expect(page.locator("#prompts-status")).to_have_text("Applied as revision 2.")
    expect(page.locator("#timeline .entry").first).to_contain_text("prompts of revision 2")
    assert table.policy.prompts[-1].startswith("now: ")

    page.get_by_text("History").click()
    page.get_by_role("button", name="Go back to revision 1").click()
    expect(template).to_have_value("{task}. Subtask: {subtask}")
    expect(page.locator("#revision")).to_have_text("revision 3 is in force")


def test_an_edit_that_somebody_else_was_faster_than_is_not_lost(table: Table, opened: Open) -> None:
    one, other = settled(opened(table.url)), settled(opened(table.url))
    for page, text in ((one, "one: {subtask}"), (other, "other: {subtask}")):
        page.get_by_label(re.compile("Action prompt")).fill(text)
    one.get_by_role("button", name="Apply").click()
    expect(other.locator("#revision")).to_have_text("revision 2 is in force")
    expect(other.locator("#prompts-status")).to_contain_text("Somebody changed the prompts")
    expect(other.get_by_label(re.compile("Action prompt"))).to_have_value("other: {subtask}")
    other.get_by_role("button", name="Apply").click()
    expect(other.locator("#prompts-status")).to_have_text("Applied as revision 3.")
    expect(one.get_by_label(re.compile("Action prompt"))).to_have_value("other: {subtask}")


def test_an_instruction_reaches_the_robot_until_it_is_withdrawn(table: Table, opened: Open) -> None:
    page = settled(opened(table.url, refused=True))
    own = page.locator("#prompt").inner_text()
    field = page.get_by_label("Tell this robot something else")
    field.fill("put every block in the right bin")
    field.press("Enter")
    expect(page.locator("#applied")).to_have_text("in force")
    expect(page.locator("#instruction-text")).to_have_text("put every block in the right bin")
    expect(page.locator("#prompt")).to_have_text(own)
    expect(page.locator("#timeline .entry").first).to_contain_text("operator")
    assert "put every block in the right bin" in table.robots[0].instructions
    assert any(prompt.startswith("put every block in the right bin") for prompt in table.policy.prompts)

    page.get_by_role("button", name="Withdraw it").click()
    expect(page.locator("#override")).to_be_hidden()
    expect(page.locator("#timeline .entry").first).not_to_contain_text("operator")
    assert table.robots[0].instructions[-1] is None

    field.fill("   ")
    field.press("Enter")
    expect(page.locator("#instruct-status")).to_contain_text("is blank")


def test_the_planner_can_be_asked_about_a_picture(table: Table, opened: Open) -> None:
    page = settled(opened(table.url, refused=True))
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#plan-problem")).to_have_text("Choose a picture first.")
    page.get_by_role("textbox", name="Task", exact=True).fill("find the cup")
    page.locator("#plan-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(320, 200)})
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer-text")).to_have_text("look at 320 pixels")
    expect(page.locator("#answer-facts")).to_contain_text("in the planner")

    page.locator("#plan-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG nothing"})
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#plan-problem")).to_contain_text("image: cannot be read as JPEG or PNG")

    page.get_by_role("button", name="Use what the robot sees now").click()
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer-text")).to_have_text("look at 224 pixels")


def test_with_a_key_it_asks_for_it_and_keeps_it_for_the_tab(opened: Open) -> None:
    with at_the_table("robot-1", api_key=KEY, control_s=CONTROL_S) as table:
        page = opened(table.url, refused=True)
        field, go_on = page.get_by_label(re.compile("admin.api_key")), page.get_by_role("button", name="Go on")
        field.fill("wrong")
        go_on.click()
        expect(page.locator("#key-problem")).to_be_visible()
        field.fill(KEY)
        go_on.click()
        settled(page)
        page.reload()
        settled(page).close()


def test_without_robots_it_says_where_they_may_connect(opened: Open) -> None:
    with at_the_table() as table:
        page = opened(table.url)
        expect(page.get_by_role("heading", name="No robot has asked yet")).to_be_visible()
        expect(page.locator("#addresses")).to_contain_text(table.service.addresses["action"])
        page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(table: Table, opened: Open, width: str, scheme: str) -> None:
    page = settled(opened(table.url, refused=True, viewport=WIDTHS[width], color_scheme=scheme, is_mobile=width == "phone"))
    page.get_by_text("History").click()
    page.get_by_label("Tell this robot something else").fill("put every block in the left bin")
    page.get_by_role("button", name="Tell it").click()
    page.get_by_label(re.compile("Action prompt")).fill("{nothing}" * 30)
    page.locator("#plan-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(320, 200)})
    page.get_by_role("button", name="Ask").click()
    for part in ("#override", "#action_prompt_template-problem", "#answer", "#revisions li"):
        expect(page.locator(part)).to_be_visible()
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= seen == WIDTHS[width]["width"]
    faint = page.evaluate(_FAINT)
    assert faint == []


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


_FAINT = """() => {
  // WCAG 2.2 contrast of every text against the ground that it stands on: at least 4.5, or 3 where it is large.
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].reduce((sum, value, i) => {
    const part = value / 255;
    return sum + [0.2126, 0.7152, 0.0722][i] * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("main *, header *, footer *, nav *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!own || element.closest("svg") || element.matches(":disabled") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(style.color)), light(ground(element))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const enough = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if ((a + 0.05) / (b + 0.05) < enough) found.push(`${element.tagName}.${element.className}: ${element.textContent.slice(0, 30)}`);
  }
  return found;
}"""
