# SPDX-License-Identifier: Apache-2.0
"""The web page as it is started: over HTTP, and in a real browser."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from launch import moving_shapes
from launch.sample import outputs
from launch.web import limits
from launch.web.service import VideoService
from pyramid_jax.data.pictures import write_picture
from tests.painter import painter

pytestmark = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs the extra `web`"
)
slow = pytest.mark.slow  # what needs the server

ROOT = Path(__file__).resolve().parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 180  # seconds for the server, and for a video


class Server(NamedTuple):
    """A running page: its address, and the folder of its results."""

    url: str
    folder: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The page of the embedded model, in a process that ends as by Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "launch.web", f"--port={port}", f"--to={folder}"]
    quiet = {"XLA_FLAGS": "", "NO_PROXY": "127.0.0.1"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests")}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | quiet | cache,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + PATIENCE
        while "the page: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}", folder)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
    assert code == 0, log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("page") / "results") as running:
        yield running


def picture(path: Path) -> Path:
    """A first frame that the embedded model knows."""
    caption = moving_shapes.parse("a yellow star moves left")
    write_picture(path, moving_shapes.render(caption, np.random.default_rng(0))[0])
    return path


def wish(client: httpx.Client, image: Any = None, **choices: Any) -> dict[str, Any]:
    """What the page would send for a video: of an image, if one is given."""
    config = client.get("/config").json()
    parts = {part["id"]: part for part in config["components"]}

    def inputs(dependency: dict[str, Any]) -> list[dict[str, Any]]:
        return [parts[i] for i in dependency["inputs"]]

    def fits(dependency: dict[str, Any]) -> bool:
        fields = inputs(dependency)
        kinds = {part["type"] for part in fields}
        return len(fields) > 5 and ("image" in kinds) == (image is not None)

    (button,) = filter(fits, config["dependencies"])
    data = []
    for part in inputs(button):
        value = part["props"].get("value")
        if part["type"] == "image":
            value = image
        for label, choice in choices.items():
            if part["props"]["label"].lower().startswith(label):
                value = choice
        data.append(value)
    return {"data": data, "fn_index": button["id"], "session_hash": str(time.time())}


def outcome(client: httpx.Client, sent: dict[str, Any]) -> dict[str, Any]:
    """What becomes of it, once it is done."""
    client.post("/gradio_api/queue/join", json=sent).raise_for_status()
    params = {"session_hash": sent["session_hash"]}
    with client.stream("GET", "/gradio_api/queue/data", params=params) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                event = json.loads(line.removeprefix("data:"))
                if event["msg"] == "process_completed":
                    return event
    raise AssertionError("the page said nothing more")


def file(path: str | Path) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@slow
def test_only_an_uploaded_image_becomes_a_first_frame(server: Server, tmp_path: Path):
    real = picture(tmp_path / "first.png")
    prompt = {"prompt": "a yellow star moves left"}
    with server.client() as client:
        for path in ("/etc/passwd", real, f"{server.folder}/../first.png"):
            event = outcome(client, wish(client, file(path), **prompt))
            assert not event["success"] and "root:" not in json.dumps(event)
        assert not list(server.folder.glob("*.mp4"))

        named = {"files": (real.name, real.read_bytes())}
        (path,) = client.post("/gradio_api/upload", files=named).json()
        event = outcome(client, wish(client, file(path), **prompt))
    assert event["success"], event
    (path,) = server.folder.glob("*.mp4")
    assert str(outputs.read(path).recipe.image).startswith("first.png sha256:")


@slow
def test_files_that_lead_to_others_are_refused(server: Server):
    text = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    with server.client() as client:
        named = {"files": ("first.png", text)}
        (path,) = client.post("/gradio_api/upload", files=named).json()
        event = outcome(client, wish(client, file(path), prompt="a star"))
    assert not event["success"]


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
        event = outcome(client, wish(client, **choices))
    assert not event["success"] and message in event["output"]["error"]


def painted(folder: Path) -> tuple[Any, Any]:
    """A page whose model has no weights, and the event that makes a video of a text."""
    from launch.web.page import page

    demo = page(VideoService(painter(), folder, folder), examples=False)
    return demo, max(demo.fns.values(), key=lambda event: len(event.inputs))


@pytest.fixture(scope="module")
def widgets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a visitor fills in, by its label."""

    async def build() -> Any:  # without a loop Gradio makes one that nobody closes
        return painted(tmp_path_factory.mktemp("widgets"))[1].inputs

    return {part.label.split(" (")[0]: part for part in asyncio.run(build())}


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
        slider = make.inputs[[part.label for part in make.inputs].index("Frames (8/s)")]
        (change,) = (e for e in demo.fns.values() if slider in e.outputs)
        await demo.process_api(change, [size], state=session)
        values = {"Height x width": size, "Frames (8/s)": frames}
        sent = [values.get(part.label, part.value) for part in make.inputs]
        return await demo.preprocess_data(make, sent, session)

    assert 5 in asyncio.run(choose("32x64", 5))
    with pytest.raises(Exception, match="Value 7 is greater than maximum value 5"):
        asyncio.run(choose("32x64", 7))


@slow
def test_no_file_but_what_the_page_shows_is_served(server: Server, tmp_path: Path):
    path = picture(tmp_path / "first.png")
    secret = server.folder / "secret.json"
    secret.write_text("{}")
    prefix = "/gradio_api/file="
    paths = ["/etc/passwd", path, secret, "pyproject.toml", ROOT / "README.md"]
    paths += ["http://127.0.0.1:9/", "https://example.org/"]
    with server.client() as client:
        assert {client.get(f"{prefix}{p}").status_code for p in paths} == {403}


@slow
def test_other_sites_large_requests_and_back_doors_are_refused(server: Server):
    with server.client() as client:

        def status(method: str, path: str, **sent: Any) -> int:
            return client.request(method, path, **sent).status_code

        assert status("GET", "/", headers={"Host": "example.org"}) == 400
        large = b" " * (limits.MESSAGE + 1)
        assert status("POST", "/gradio_api/queue/join", content=large) == 413
        files = {"files": bytes(limits.UPLOAD + 1)}
        assert status("POST", "/gradio_api/upload", files=files) == 413
        sent = wish(client, prompt="x")
        assert status("POST", "/gradio_api/run/predict", json=sent) == 404
        sent = wish(client, image={"path": "https://example.org/first.png"})
        assert status("POST", "/gradio_api/queue/join", json=sent) == 403
        assert status("GET", "/monitoring/summary") in (403, 404)
        assert status("GET", "/gradio_api/proxy=https://example.org/x.png") == 403


@slow
def test_other_sites_do_not_use_the_page_of_a_visitor(server: Server):
    """They may send JSON only where it is called text, and are not told the answer."""
    join, foreign = "/gradio_api/queue/join", {"Origin": "https://example.org"}
    with server.client() as client:
        asked = foreign | {"Access-Control-Request-Method": "POST"}
        answer = client.options(join, headers=asked)
        assert "access-control-allow-origin" not in answer.headers
        sent = json.dumps(wish(client, prompt="x"))
        text = foreign | {"Content-Type": "text/plain"}
        assert client.post(join, content=sent, headers=text).status_code == 422


@slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome in PATH")
def test_a_visitor_makes_videos_and_finds_them_again(server: Server, tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        from_text(page)
        from_image(page, picture(tmp_path / "first.png"))
        page.locator("#results button img").nth(1).click()
        expect_settings(page, "a red circle moves left", "seed: 3\n")
        page.get_by_role("tab", name="Text to video").click()
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    here = (f"{server.url}/", "data:", "blob:")
    assert asked and all(url.startswith(here) for url in asked), asked


def from_text(page: Any) -> None:
    """Makes a video of a prompt, watching its progress, and sees it play."""
    page.evaluate(
        "() => { window.told = ''; new MutationObserver("
        "() => { window.told += document.body.innerText.match(/unit .*/) ?? ''; }"
        ").observe(document, {subtree: true, childList: true, characterData: true}); }"
    )
    button = page.get_by_role("button", name="Make a video").first
    button.click()
    page.get_by_text("the prompt is empty").wait_for()
    page.get_by_role("button", name="a red circle moves left").click()
    page.get_by_label("Seed").first.fill("3")
    button.click()
    expect_settings(page, "a red circle moves left", "seed: 3\n")
    assert "stage 2/2, step" in page.evaluate("told")
    page.wait_for_function(
        "() => { const video = document.querySelector('#made video');"
        "return video && !video.paused && video.currentTime > 0; }"
    )


def from_image(page: Any, path: Path) -> None:
    """Uploads a first frame, and makes a video that begins with it."""
    before = page.locator("#results button img").count()
    page.get_by_role("tab", name="Image to video").click()
    page.get_by_label("Prompt", exact=True).last.fill("a yellow star moves left")
    button = page.get_by_role("button", name="Make a video").last
    button.click()
    page.get_by_text("there is no first frame; upload an image").wait_for()
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("button", name="Remove Image").wait_for()
    button.click()
    expect_settings(page, "a yellow star moves left", "first frame: first.png")
    page.locator("#results button img").nth(before).wait_for()


def expect_settings(page: Any, *parts: str) -> None:
    """Waits for the settings of a video with these parts."""
    page.wait_for_function(
        "parts => [...document.querySelectorAll('textarea')].some("
        "area => parts.every(part => area.value.includes(part)))",
        arg=list(parts),
    )


@slow
def test_a_queue_that_is_full_takes_no_more(server: Server):
    with server.client() as client:
        sent = wish(client, prompt="a green star moves up")
        codes = [
            client.post("/gradio_api/queue/join", json=sent).status_code
            for _ in range(10)
        ]
    assert codes[:8] == [200] * 8 and codes[-1] == 503
