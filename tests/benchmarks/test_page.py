# SPDX-License-Identifier: Apache-2.0
"""The wait for a first frame is measured in a real browser."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import page
from tests.page_server import BROWSER


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None or find_spec("gradio") is None, reason="needs a browser, and gradio"
)
def test_the_first_frame_is_drawn_before_the_video_is_there(tmp_path: Path):
    page.main(["--videos=2", f"--to={tmp_path / 'page.json'}"])
    each = json.loads((tmp_path / "page.json").read_text())["each"]
    assert len(each["first"]) == len(each["video"]) == 2
    assert all(0 < a < b for a, b in zip(each["first"], each["video"], strict=True))
