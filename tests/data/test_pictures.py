# SPDX-License-Identifier: Apache-2.0
"""Pictures cover a size without distortion; files keep pixels, times and comments."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyramid_jax.data import pictures, video_io

COMMENT = '{"prompt": "ein Löwe, 獅子"}' + "x" * 1000  # longer than a block of GIF
NOISE = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), np.uint8)


def test_a_picture_of_the_size_is_unchanged(tmp_path: Path):
    pictures.write_picture(tmp_path / "a.png", NOISE[0])
    read = pictures.read_picture(tmp_path / "a.png", (32, 48))
    np.testing.assert_array_equal(read, NOISE[0])


def test_a_picture_covers_the_size_and_is_cropped_on_both_sides_alike(tmp_path: Path):
    thirds = np.zeros((30, 90, 3), np.uint8)
    thirds[:, 30:60] = 200
    pictures.write_picture(tmp_path / "a.png", thirds)
    middle = pictures.read_picture(tmp_path / "a.png", (60, 60))
    assert middle.shape == (60, 60, 3) and (middle[:, 6:-6] == 200).all()
    np.testing.assert_array_equal(middle, middle[:, ::-1])


def test_a_picture_is_scaled_with_the_filter_of_the_original(tmp_path: Path):
    pictures.write_picture(tmp_path / "a.png", NOISE[0])
    small = Image.fromarray(NOISE[0]).resize((24, 16), Image.Resampling.LANCZOS)
    read = pictures.read_picture(tmp_path / "a.png", (16, 24))
    np.testing.assert_array_equal(read, np.asarray(small))


def test_transparent_parts_become_white_and_sideways_photographs_upright(
    tmp_path: Path,
):
    rgba = np.full((16, 16, 4), 90, np.uint8)
    rgba[:8, :, 3], rgba[8:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = pictures.read_picture(tmp_path / "a.png", (16, 16))
    assert (read[:8] == 255).all() and (read[8:] == 90).all()

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(read).save(tmp_path / "b.png", exif=exif)
    turned = pictures.read_picture(tmp_path / "b.png", (16, 16))
    np.testing.assert_array_equal(turned, read[::-1, ::-1])


def test_arrays_and_open_pictures_are_fitted_like_files(tmp_path: Path):
    pictures.write_picture(tmp_path / "a.png", NOISE[0])
    read = pictures.read_picture(tmp_path / "a.png", (16, 30))
    for image in (NOISE[0], Image.fromarray(NOISE[0])):
        np.testing.assert_array_equal(pictures.fit_picture(image, (16, 30)), read)
    np.testing.assert_array_equal(pictures.fit_picture(NOISE[0], (32, 48)), NOISE[0])


def test_a_gif_lasts_as_long_as_the_video(tmp_path: Path):
    pictures.write_gif(tmp_path / "a.gif", NOISE, 24)
    times = []
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        for place in range(gif.n_frames):
            gif.seek(place)
            times.append(gif.info["duration"])
    assert len(times) == 7 and set(times) == {40, 50}
    assert sum(times) == pytest.approx(1000 * 7 / 24, abs=5)


def test_comments_are_found_again(tmp_path: Path):
    png, gif, mp4 = (tmp_path / f"a.{kind}" for kind in ("png", "gif", "mp4"))
    pictures.write_picture(png, NOISE[0], COMMENT)
    pictures.write_gif(gif, NOISE, 8, COMMENT)
    video_io.write_video(mp4, NOISE, 8, comment=COMMENT)
    assert (
        pictures.read_picture_comment(png)
        == pictures.read_picture_comment(gif)
        == COMMENT
    )
    assert video_io.read_video_comment(mp4) == COMMENT


def test_files_without_a_comment_have_an_empty_one(tmp_path: Path):
    Image.fromarray(NOISE[0]).save(tmp_path / "a.png")
    video_io.write_video(tmp_path / "a.mp4", NOISE, 8)
    assert pictures.read_picture_comment(tmp_path / "a.png") == ""
    assert video_io.read_video_comment(tmp_path / "a.mp4") == ""


def test_what_is_no_picture_is_named(tmp_path: Path):
    pictures.write_picture(tmp_path / "a.png", NOISE[0])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            pictures.read_picture(tmp_path / name, (16, 16))


def test_a_gif_of_no_frame_or_too_fast_is_refused(tmp_path: Path):
    for video, fps in ((NOISE[:0], 8), (NOISE, 60)):
        with pytest.raises(ValueError, match="write an mp4"):
            pictures.write_gif(tmp_path / "a.gif", video, fps)
