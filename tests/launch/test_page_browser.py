# SPDX-License-Identifier: Apache-2.0
"""The web page in a real browser, wide and as narrow as a phone."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.sample.outputs import beside
from tests.page_server import (
    BROWSER,
    PATIENCE,
    POLLING,
    Server,
    held,
    outcome,
    picture,
    press,
    running_browser,
    served,
    told,
    wish,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra `web`"),
    pytest.mark.skipif(
        BROWSER is None, reason="needs chromium or google-chrome in PATH"
    ),
]
PROMPT = "a red circle moves left"
SCRIPT = "<img src=x onerror='window.fooled = true'>"
# The boxes of elements that stick out of the window to the right.
OUTSIDE = """
() => [...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 100))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A page that has made a video: its process compiles nothing any more."""
    folder = tmp_path_factory.mktemp("page") / "results"
    with served(folder, "tests.held_page") as running:
        make(running, PROMPT)
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(autouse=True)
def closed(browser: Any) -> Iterator[None]:
    """Closes what a test has opened: a page plays its video until then."""
    yield
    for context in browser.contexts:
        context.close()


def make(server: Server, prompt: str) -> None:
    """Makes a video without a browser."""
    with server.client() as client:
        assert not told(outcome(client, wish(client, prompt=prompt)))


def visit(browser: Any, server: Server) -> Any:
    """The page as a new visitor sees it, with the results so far."""
    page = browser.new_context(viewport={"width": 1280, "height": 844}).new_page()
    page.set_default_timeout(1e3 * PATIENCE)
    page.goto(server.url)
    page.get_by_role("button", name="Make a video").first.wait_for()
    page.locator("#results button img").first.wait_for()
    return page


def ask(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    press(page.get_by_role("button", name="Make a video").first)


def show(page: Any, prompt: str = PROMPT) -> None:
    """Shows an earlier result of this prompt, as if it had just been made."""
    page.locator("#results button", has_text=prompt).first.click()
    expect_settings(page, prompt)


def test_a_visitor_makes_videos_and_finds_them_again(
    browser: Any, server: Server, tmp_path: Path
):
    asked: list[str] = []
    refused: list[str] = []
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.set_default_timeout(1e3 * PATIENCE)
    page.on("request", lambda request: asked.append(request.url))
    page.on(
        "response", lambda answer: answer.ok or refused.append(f"{answer.url} refused")
    )
    page.goto(server.url)
    from_text(page, server)
    from_image(page, picture(tmp_path / "first.png"))
    page.locator("#results button img").nth(1).click()
    expect_settings(page, "a red circle moves sideways", "seed: 3\n")
    here = (f"{server.url}/", "data:", "blob:")
    assert asked and all(url.startswith(here) for url in asked), asked
    assert not [url for url in refused if "/gradio_api/file=" not in url]


def test_columns_stand_below_each_other_on_a_phone(browser: Any, server: Server):
    page = visit(browser, server)
    for width, stacked in ((1280, False), (390, True)):
        page.set_viewport_size({"width": width, "height": 844})
        button = page.get_by_role("button", name="Make a video").first.bounding_box()
        status = page.locator("#status").bounding_box()
        assert (status["y"] > button["y"]) == stacked
        assert (status["x"] > button["x"] + 9) != stacked
    show(page)
    wait(page, "() => document.querySelector('#made video')?.videoWidth")
    for width in 390, 1280:
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate(OUTSIDE) == []
        video = page.locator("#made video").bounding_box()
        assert 250 < video["height"] <= 384
        style = "e => getComputedStyle(e).imageRendering"
        assert page.locator("#made video").evaluate(style) == "pixelated"


def test_only_what_says_something_is_seen(browser: Any, server: Server):
    page = visit(browser, server)
    page.get_by_text("It draws two objects that move, and nothing else.").wait_for()
    assert not page.locator("#made").is_visible()  # which others have asked for
    assert not page.get_by_text("Made with").is_visible()
    show(page)
    page.locator("#made video").wait_for()
    assert not page.locator("#status").is_visible()


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [(" ", "1", "the prompt is empty"), (PROMPT, "9999999999", "greater than maximum")],
)
def test_an_error_takes_the_last_video_away(
    browser: Any, server: Server, prompt: str, seed: str, message: str
):
    page = visit(browser, server)
    show(page)
    page.get_by_label("Seed").first.fill(seed)
    page.get_by_label("Prompt", exact=True).first.fill(prompt)
    page.get_by_role("button", name="Make a video").first.click()
    page.get_by_text(message).first.wait_for()  # Gradio takes its own away in seconds
    page.locator("#made").wait_for(state="hidden")
    assert not page.get_by_text("Made with").is_visible()


def test_a_video_survives_a_reload(browser: Any, server: Server):
    page = visit(browser, server)
    with held(server, "unit 2/9"):
        ask(page, "a green star moves up")
        page.get_by_text("unit 2/9").wait_for()
        page.reload()
        page.get_by_text("unit 2/9").wait_for()
    expect_settings(page, "a green star moves up")
    page.reload()
    expect_settings(page, "a green star moves up")


def test_what_is_asked_for_last_is_shown(browser: Any, server: Server):
    page = visit(browser, server)
    with held(server, "unit 2/9"):
        ask(page, "a green star moves down")
        page.get_by_text("unit 2/9").wait_for()
        page.reload()
        page.get_by_text("unit 2/9").wait_for()
        ask(page, "")
        page.get_by_text("the prompt is empty").wait_for()
    make(server, PROMPT)  # after the one that is not followed any more
    assert page.get_by_text("the prompt is empty").is_visible()


def test_frames_are_seen_while_later_ones_are_sampled(browser: Any, server: Server):
    page = visit(browser, server)
    image = page.locator("#preview img")
    with held(server, "unit 3/9") as hold:
        ask(page, "a green star moves up")
        image.wait_for()
        assert page.locator("#status progress").is_visible()
        first = image.get_attribute("src")
        hold.write_text("unit 9/9")
        page.get_by_text("unit 9/9").wait_for()
        changed = "first => document.querySelector('#preview img').src != first"
        wait(page, changed, first)
        assert image.evaluate("e => [e.naturalWidth, e.naturalHeight]") == [64, 64]
    expect_settings(page, "a green star moves up")
    assert not image.is_visible()


def test_a_video_goes_on_with_another_prompt(browser: Any, server: Server):
    page = visit(browser, server)
    button = page.get_by_role("button", name="Continue")
    assert not button.is_visible()
    show(page)
    page.get_by_label("How it goes on").fill("a red circle moves up")
    press(button)
    button.wait_for(state="hidden")
    expect_settings(page, "a red circle moves up", "65 frames", "continues: ")
    button.wait_for()


def test_prompts_are_shown_as_text(browser: Any, server: Server):
    video = min(server.folder.glob("*.mp4"))
    record = json.loads(beside(video).read_text(encoding="utf-8"))
    record["recipe"]["prompt"] = SCRIPT
    copy = server.folder / "script.mp4"
    beside(copy).write_text(json.dumps(record), encoding="utf-8")
    shutil.copyfile(video, copy)
    page = visit(browser, server)
    show(page, SCRIPT)
    page.wait_for_timeout(500)
    assert page.evaluate("window.fooled") is None


def from_text(page: Any, server: Server) -> None:
    """Makes a video of a prompt, watching its progress, and sees it play."""
    button = page.get_by_role("button", name="Make a video").first
    press(button)
    page.get_by_text("the prompt is empty").wait_for()
    page.get_by_role("button", name="a red circle moves sideways").click()
    wait(  # Gradio asks its server what the example fills in
        page,
        "() => [...document.querySelectorAll('textarea')]"
        ".some(box => box.value.startsWith('a red circle'))",
    )
    page.get_by_label("Seed").first.fill("3")
    page.get_by_text("Steps, guidance, negative prompt").first.click()
    page.get_by_label("number input for Steps, later").first.fill("4")
    with held(server, "unit 9/9, stage 3/3"):
        press(button)
        page.get_by_text("unit 9/9, stage 3/3").wait_for()
    expect_settings(
        page, "a red circle moves sideways", "seed: 3\n", "4 + 4 + 4 for later"
    )
    wait(
        page,
        "() => { const video = document.querySelector('#made video');"
        "return video && !video.paused && video.currentTime > 0; }",
    )


def from_image(page: Any, path: Path) -> None:
    """Uploads a first frame, and makes a video that begins with it."""
    before = page.locator("#results button img").count()
    page.get_by_role("tab", name="Image to video").click()
    page.get_by_label("Prompt", exact=True).last.fill("a yellow star moves left")
    button = page.get_by_role("button", name="Make a video").last
    press(button)
    page.get_by_text("there is no first frame; upload an image").wait_for()
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("button", name="Remove Image").wait_for()
    press(button)
    expect_settings(page, "a yellow star moves left", "first frame: first.png")
    page.locator("#results button img").nth(before).wait_for()


def expect_settings(page: Any, *parts: str) -> None:
    """Waits for the text that says what a video was made with, with these parts."""
    wait(
        page,
        "parts => [...document.querySelectorAll('textarea')].some("
        "area => parts.every(part => area.value.includes(part)))",
        ["prompt: ", "made: ", *parts],
    )


def wait(page: Any, condition: str, argument: Any = None) -> None:
    page.wait_for_function(condition, arg=argument, polling=POLLING)
