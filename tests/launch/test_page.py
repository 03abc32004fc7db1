# SPDX-License-Identifier: Apache-2.0
"""What visitors may ask of the web page, and what they are told, over HTTP."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.sample import outputs
from launch.web.service import VideoService
from launch.web.tasks import TaskQueue
from tests.page_server import Server, file, outcome, picture, served, told, wish
from tests.painter import painter

pytestmark = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs the extra `web`"
)
slow = pytest.mark.slow  # what needs the server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("page") / "results") as running:
        yield running


@slow
def test_only_an_uploaded_image_becomes_a_first_frame(server: Server, tmp_path: Path):
    real = picture(tmp_path / "first.png")
    prompt = {"prompt": "a yellow star moves left"}
    with server.client() as client:
        for path in ("/etc/passwd", real, f"{server.folder}/../first.png"):
            event = outcome(client, wish(client, file(path), **prompt))
            assert told(event) and "root:" not in str(event)
        assert not list(server.folder.glob("*.mp4"))

        named = {"files": (real.name, real.read_bytes())}
        (path,) = client.post("/gradio_api/upload", files=named).json()
        event = outcome(client, wish(client, file(path), **prompt))
    assert not told(event)
    (path,) = server.folder.glob("*.mp4")
    assert str(outputs.read(path).recipe.image).startswith("first.png sha256:")


@slow
def test_files_that_lead_to_others_are_refused(server: Server):
    text = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    with server.client() as client:
        named = {"files": ("first.png", text)}
        (path,) = client.post("/gradio_api/upload", files=named).json()
        event = outcome(client, wish(client, file(path), prompt="a star"))
    assert "no image that can be read" in told(event)


@slow
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 1001}, "1001 characters; use at most 1000"),
        (
            {"prompt": "x", "negative": "x" * 1001},
            "negative prompt has 1001 characters",
        ),
        ({"prompt": "x", "seed": 2**40}, "Value 1099511627776 is greater than maximum"),
        ({"prompt": "x", "seed": -2}, "Value -2 is less than minimum value -1"),
        ({"prompt": "x", "frames": 999}, "999"),
        ({"prompt": "x", "frames": 4}, "4 frames are not 1 + a multiple of 2"),
        ({"prompt": "x", "height": "9999x9999"}, "9999x9999"),
        ({"prompt": "x", "steps, frame 1": 10**6}, "1000000"),
        ({"prompt": "x", "steps, later": 0}, "Value 0 is less than minimum value 1"),
        ({"prompt": "x", "guidance, later": 20.5}, "greater than maximum value 20"),
    ],
)
def test_the_server_refuses_in_words_what_the_page_would_not_send(
    server: Server, choices: dict[str, Any], message: str
):
    with server.client() as client:
        assert message in told(outcome(client, wish(client, **choices)))


def painted(folder: Path) -> tuple[Any, Any]:
    """A page whose model has no weights, and the event that makes a video of a text."""
    from launch.web.page import page

    tasks = TaskQueue(VideoService(painter(), folder, folder))
    demo = page(tasks, examples=False)
    return demo, max(demo.fns.values(), key=lambda event: len(event.inputs))


@pytest.fixture(scope="module")
def widgets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a visitor fills in, by its label."""

    async def build() -> Any:  # without a loop Gradio makes one that nobody closes
        return painted(tmp_path_factory.mktemp("widgets"))[1].inputs

    parts = [part for part in asyncio.run(build()) if getattr(part, "label", "")]
    return {part.label.split(" (")[0]: part for part in parts}


@pytest.mark.parametrize(
    ("label", "value", "result"),
    [
        ("Frames", 5.0, 5),
        ("Frames", 4.4, 4),
        ("Frames", 1, "less than minimum value 3"),
        ("Frames", 8, "greater than maximum value 7"),
        ("Frames", "7", "not supported between"),
        ("Frames", None, "not supported between"),
        ("Frames", [7], "not supported between"),
        ("Frames", float("nan"), "cannot convert float NaN"),
        ("Seed", None, None),
        ("Seed", -1, -1),
        ("Seed", True, 1),
        ("Seed", 2**31 - 1, 2**31 - 1),
        ("Seed", 2**31, "greater than maximum value 2147483647"),
        ("Seed", -2, "less than minimum value -1"),
        ("Seed", "7", "not supported between"),
        ("Steps, frame 1", 101, "greater than maximum value 100"),
        ("Steps, later", 0, "less than minimum value 1"),
        ("Guidance, frame 1", -1, "less than minimum value 0"),
        ("Guidance, later", float("inf"), "greater than maximum value 20"),
        ("Height x width", "4096x4096", "not in the list of choices"),
        ("Height x width", ["4096x4096"], "not in the list of choices"),
    ],
)
def test_widgets_check_on_the_server_what_they_allow(
    widgets: dict[str, Any], label: str, value: Any, result: Any
):
    if not isinstance(result, str):
        number = widgets[label].preprocess(value)
        assert number == result and type(number) is type(result)
    else:
        with pytest.raises(Exception, match=result):
            widgets[label].preprocess(value)


def test_the_lengths_that_the_server_allows_are_those_of_the_size(tmp_path: Path):
    from gradio.state_holder import SessionState

    async def choose(size: str, frames: int) -> list[Any]:
        demo, make = painted(tmp_path)
        session = SessionState(demo)
        labels = [getattr(part, "label", "") for part in make.inputs]
        slider = make.inputs[labels.index("Frames (8/s)")]
        (change,) = (e for e in demo.fns.values() if slider in e.outputs)
        await demo.process_api(change, [size], state=session)
        values = {"Height x width": size, "Frames (8/s)": frames}
        pairs = zip(labels, make.inputs, strict=True)
        sent = [values.get(label, part.value) for label, part in pairs]
        return await demo.preprocess_data(make, sent, session)

    assert 5 in asyncio.run(choose("32x64", 5))
    with pytest.raises(Exception, match="Value 7 is greater than maximum value 5"):
        asyncio.run(choose("32x64", 7))


def test_what_the_page_says_is_no_html():
    from launch.web.screen import Screen

    status, *_ = Screen().refusal("no <img src=x onerror=alert(1)>")
    assert "no &lt;img src=x" in status.value and "<img" not in status.value
