# SPDX-License-Identifier: Apache-2.0
"""The pictures of README are what its command makes, and small."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from docs import pictures

LARGEST = 1_000_000  # bytes of the moving picture
_PIXELS = re.compile(r"base64,([^\"]+)")


def decoded(svg: str) -> list[np.ndarray]:
    """The pixels of a drawing; how PNG packs them depends on the library."""
    data = [base64.b64decode(text) for text in _PIXELS.findall(svg)]
    return [np.asarray(Image.open(io.BytesIO(each))) for each in data]


def test_the_drawing_is_what_its_command_makes():
    kept = (pictures.IMAGES / "pyramid.svg").read_text(encoding="utf-8")
    made = pictures.drawing()
    assert _PIXELS.sub("", kept) == _PIXELS.sub("", made)
    for old, new in zip(decoded(kept), decoded(made), strict=True):
        assert old.shape == new.shape
        assert np.abs(old.astype(int) - new).max() <= 1


def test_badges_say_what_project_and_results_say():
    for name, text in pictures.badges().items():
        assert (pictures.IMAGES / name).read_text(encoding="utf-8") == text, (
            "run: python -m docs.pictures --only=badges"
        )


def test_a_badge_of_failed_comparisons_would_say_so(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "parity.json").write_text('{"verdicts": {"ok": 3, "FAIL": 2}}')
    project = (pictures.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    assert "3 tensors, 2 differ" in pictures.badges()["badge_parity.svg"]


def test_the_moving_picture_has_all_frames_and_is_small():
    path = pictures.IMAGES / "videos.webp"
    assert path.stat().st_size < LARGEST
    with Image.open(path) as image:
        assert image.n_frames == pictures.FRAMES and image.info["loop"] == 0


def test_videos_stand_side_by_side_over_their_captions():
    videos = [np.full((2, 64, 64, 3), 40 * i, np.uint8) for i in range(4)]
    pages = pictures.sheet(videos, ["a word"] * 3 + ["many words " * 9])
    assert len(pages) == 2 and pages[0].size == pages[1].size
    columns, step = pictures.COLUMNS, pictures.SCALE * 64 + pictures.MARGIN
    inside = pictures.MARGIN + 5
    for i in range(4):
        x = inside + i % columns * step
        y = inside + i // columns * (pages[0].height // 2)
        assert pages[1].getpixel((x, y)) == (40 * i,) * 3


@pytest.mark.slow
def test_the_command_writes_the_moving_picture(tmp_path):
    pictures.write_videos(tmp_path / "videos.webp", seed=1)
    assert (tmp_path / "videos.webp").stat().st_size < LARGEST
