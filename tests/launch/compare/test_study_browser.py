# SPDX-License-Identifier: Apache-2.0
"""The page of a study in a real browser: raters use keys, leave, and come back."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.compare.answers import read_answers
from launch.compare.study import Study, paired
from tests.launch.compare.conftest import BRIGHT, GREY
from tests.page_server import BROWSER, Server, running_browser, served

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra `web`"),
    pytest.mark.skipif(
        BROWSER is None, reason="needs chromium or google-chrome in PATH"
    ),
]
PATIENCE = 90_000  # milliseconds
SHADES = """
() => [...document.querySelectorAll('video')].map(video => {
  const canvas = document.createElement('canvas');
  canvas.getContext('2d').drawImage(video, 0, 0);
  return canvas.getContext('2d').getImageData(9, 9, 1, 1).data[1];
})
"""
PLAYING = """
() => [...document.querySelectorAll('video')].every(video => video.currentTime > 0)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


def visit(browser: Any, server: Server, name: str) -> Any:
    """The page once a new rater has given his name."""
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin").click()
    expect(page, f"{name}: pair 1 of 3")
    return page


def expect(page: Any, text: str) -> None:
    page.get_by_text(text).wait_for()


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_raters_use_keys_and_find_their_progress_again(
    browser: Any, folders: tuple[Path, Path], tmp_path: Path
):
    study = Study(("", ""), paired(*folders), 0)
    given = f"--videos={folders[0]}", f"--against={folders[1]}"
    to = tmp_path / "study"
    with served(to, "launch.compare", *given) as server:
        page = visit(browser, server, "Anna")
        page.wait_for_function(PLAYING)
        turns, asked = study.turns("anna"), []
        page.on("request", lambda request: asked.append(request.url))
        assert page.get_by_role("heading").all_inner_texts() == [
            study.pairs[turns[0].pair].prompt
        ]
        left, right = page.evaluate(SHADES)
        assert (left < (GREY + BRIGHT) / 2 < right) == (turns[0].left == 0)

        press(page, "ArrowLeft", "ArrowDown", "ArrowLeft", "ArrowUp", "Enter")
        expect(page, "pair 1 of 3")  # as a question is open
        press(page, "ArrowRight", "Enter")
        expect(page, "pair 2 of 3")
        page.get_by_role("radio", name="same").nth(1).check()  # by mouse, in any order
        page.get_by_role("radio", name="right").nth(0).check()
        assert page.get_by_role("button", name="Next pair").is_disabled()
        press(page, "ArrowRight")
        page.get_by_role("button", name="Next pair").click()
        expect(page, "pair 3 of 3")
        page.reload()
        expect(page, "Anna: pair 3 of 3")
        visit(browser, server, "Bo").close()
        assert not [url for url in asked if "elder" in url or "younger" in url]

    with served(to, "launch.compare", *given) as server:  # on another port
        page = browser.new_context().new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        page.get_by_label("Your name").fill("anna")
        press(page, "Enter")
        expect(page, "anna: pair 3 of 3")
        press(page, "ArrowDown", "ArrowDown", "ArrowDown", "Enter")
        expect(page, "All pairs are rated. Thank you!")
        page.get_by_role("button", name="Another rater").last.click()
        page.get_by_label("Your name").wait_for()
    given_answers = read_answers(to / "answers.jsonl", 3)
    assert [(x.rater, x.pair, x.left) for x in given_answers] == [
        ("anna", *turn) for turn in turns
    ]
    assert [[*x.choices.values()] for x in given_answers] == [
        ["left", "same", "right"],
        ["right", "same", "right"],
        ["same", "same", "same"],
    ]


@pytest.mark.slow
def test_what_the_server_refuses_is_shown_and_nothing_is_lost(
    browser: Any, folders: tuple[Path, Path], tmp_path: Path
):
    given = f"--videos={folders[0]}", f"--against={folders[1]}"
    with served(tmp_path / "study", "launch.compare", *given) as server:
        page = visit(browser, server, "Anna")
        full = {"status": 507, "body": "the answer was not kept: the disk is full"}
        page.route("**/answer", lambda route: route.fulfill(**full))
        press(page, "ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter")
        page.get_by_role("alert").get_by_text("the disk is full").wait_for()
        assert page.get_by_role("radio", checked=True).count() == 3
        page.unroute("**/answer")
        press(page, "Enter")
        expect(page, "pair 2 of 3")
        assert not page.get_by_role("alert").is_visible()
    (line,) = (tmp_path / "study" / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["rater"] == "anna"
