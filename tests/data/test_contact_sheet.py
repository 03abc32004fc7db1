# SPDX-License-Identifier: Apache-2.0
"""Contact sheets show the frames of the videos."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pyramid_jax.data.pictures import write_contact_sheet


def test_every_video_is_a_row_of_its_frames(tmp_path: Path):
    red = np.zeros((8, 16, 16, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    blue = red[..., ::-1]
    path = write_contact_sheet(tmp_path / "a" / "b.png", [red, blue], ["red", "blue"])
    picture = matplotlib.image.imread(path)[..., :3]
    top, bottom = np.split(picture[: len(picture) // 2 * 2], 2)
    assert is_colour(top, (1, 0, 0)) > 0.5 and is_colour(top, (0, 0, 1)) == 0
    assert is_colour(bottom, (0, 0, 1)) > 0.5 and is_colour(bottom, (1, 0, 0)) == 0


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The fraction of pixels that have the colour."""
    return float((np.abs(picture - colour).max(axis=-1) < 0.01).mean())


def test_videos_of_different_lengths_share_a_sheet(tmp_path: Path):
    videos = [np.zeros((n, 8, 8, 3), np.uint8) for n in (1, 5)]
    assert write_contact_sheet(tmp_path / "a.png", videos, ["", ""]).is_file()


def test_captions_must_match_the_videos(tmp_path: Path):
    with pytest.raises(ValueError, match="1 videos and 2 captions; give one for each"):
        write_contact_sheet(
            tmp_path / "a.png", [np.zeros((1, 8, 8, 3), np.uint8)], "ab"
        )
    with pytest.raises(ValueError, match="0 videos"):
        write_contact_sheet(tmp_path / "a.png", [], [])
