# SPDX-License-Identifier: Apache-2.0
"""How long a visitor of the web page waits for the first frame of a video.

    python -m benchmarks.page --to benchmarks/results/page.json

The page runs in a process of its own, with the embedded model, and in a real browser,
which is what says when the button was pressed, when the first frame was drawn, and when
the video was there. A first video, which compiles everything, is not counted. It needs
the extra `web`, playwright, and chromium.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import environment
from launch.web.page import PROMPTS
from tests.page_server import PATIENCE, POLLING, running_browser, served

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gradio")
BUTTON = "Make a video"
# Times of the last click on a button, of new frames and of a finished video after it.
WATCH = """
() => {
  document.addEventListener('click', () => {
    window.times = {clicked: performance.now()};
  }, true);
  document.addEventListener('load', event => {
    if (event.target.matches?.('#preview img'))
      times.first ??= performance.now() - times.clicked;
  }, true);
  document.addEventListener('loadeddata', event => {
    if (event.target.matches?.('#made video'))
      times.video ??= performance.now() - times.clicked;
  }, true);
}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the times, and writes them where `--to` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="JSON file to write")
    parser.add_argument("--videos", type=int, default=9, help="that are timed")
    options = parser.parse_args(argv)
    result = {"environment": environment(PACKAGES), **waited(options.videos)}
    text = json.dumps(result, indent=2)
    print(text)
    if options.to:
        options.to.write_text(text + "\n", encoding="utf-8")


def waited(videos: int) -> dict[str, Any]:
    """Seconds from a click to the first frame, and to the video, of each video."""
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder) / "results") as server,
        running_browser() as browser,
    ):
        page = browser.new_page()
        page.set_default_timeout(1e3 * PATIENCE)
        page.goto(server.url)
        button = page.get_by_role("button", name=BUTTON).first
        button.wait_for()
        page.evaluate(WATCH)
        times = []
        for _ in range(1 + videos):
            page.get_by_label("Prompt", exact=True).first.fill(PROMPTS[0])
            button.click()
            page.wait_for_function("window.times?.video", polling=POLLING)
            times.append(page.evaluate("times"))
            page.wait_for_timeout(500)  # until the page takes a click again
    seconds = {
        name: [round(each[name] / 1e3, 3) for each in times[1:]]
        for name in ("first", "video")
    }
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {"seconds": medians, "each": seconds}


if __name__ == "__main__":
    main()
