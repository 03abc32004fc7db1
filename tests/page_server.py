# SPDX-License-Identifier: Apache-2.0
"""Web pages as they are started, for tests over HTTP and in a real browser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from launch.pairs.dataset import pair
from pyramid_jax.data.pictures import write_picture

ROOT = Path(__file__).resolve().parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 400  # seconds for the server, and for a video
POLLING = 200  # milliseconds; a look at every frame would keep a core busy with frames
# What the page says of a video, or which one it shows.
SHOWN = """
() => (document.querySelector('#status')?.textContent ?? '')
  + (document.querySelector('#made video')?.src ?? '')
"""


class Server(NamedTuple):
    """A running page: its address, and the folder of its results."""

    url: str
    folder: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE)


@contextmanager
def running_browser() -> Iterator[Any]:
    """A real browser without a window; tests are skipped where there is no driver."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


def press(button: Any) -> None:
    """Clicks until the page answers: it drops clicks until the last one is done."""
    sync_api = pytest.importorskip("playwright.sync_api")
    page, polled = button.page, {"polling": POLLING, "timeout": 5000}
    before, changed = page.evaluate(SHOWN), f"before => ({SHOWN})() != before"
    while True:
        button.click()
        with suppress(sync_api.TimeoutError):
            page.wait_for_function(changed, arg=before, **polled)
            return


@contextmanager
def held(server: Server, step: str) -> Iterator[Path]:
    """The file that says at which step the videos of a `tests.held_page` wait."""
    hold = server.folder / "hold"
    hold.write_text(step)
    try:
        yield hold
    finally:
        hold.unlink()


@contextmanager
def served(
    folder: Path, program: str = "launch.web", *options: str
) -> Iterator[Server]:
    """The page of a program, in a process that ends as by Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", program, f"--port={port}", f"--to={folder}"]
    quiet = {"XLA_FLAGS": "", "NO_PROXY": "127.0.0.1"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests")}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options],
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


def picture(path: Path) -> Path:
    """A first frame that the embedded model knows."""
    write_picture(path, pair(5, split="held out").pixels[0])
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
            if part["props"].get("label", "").lower().startswith(label):
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


def told(event: dict[str, Any]) -> str:
    """Why there is no video, in the words that the visitor reads, or ""."""
    if not event["success"]:
        return event["output"]["error"] or "Error"
    status, *_ = event["output"]["data"]
    return status.get("value", "")
