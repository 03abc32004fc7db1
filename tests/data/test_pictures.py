# SPDX-License-Identifier: Apache-2.0
"""Pictures cover a size without distortion; files keep pixels, times and comments."""

import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from PIL import ExifTags, Image

from pyramid_jax.data import pictures, video_io
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.source import nearest_size, read_pixels

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


def test_transparent_parts_become_white(tmp_path: Path):
    rgba = np.full((16, 16, 4), 90, np.uint8)
    rgba[:8, :, 3], rgba[8:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = pictures.read_picture(tmp_path / "a.png", (16, 16))
    assert (read[:8] == 255).all() and (read[8:] == 90).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_and_mirrored_as_their_camera_says(
    tmp_path: Path, orientation: int
):
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    shown, path = turns[orientation](NOISE[0]), tmp_path / "a.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(NOISE[0]).save(path, exif=exif)
    size = pictures.picture_size(path)
    assert size == shown.shape[:2]
    np.testing.assert_array_equal(pictures.read_picture(path, size), shown)
    for sizes in (((32, 48), (48, 32)), ((48, 32), (32, 48))):
        assert nearest_size(sizes, Record(path, "image", "")) == size


def test_training_reads_an_image_like_a_first_frame(tmp_path: Path):
    rgba = np.dstack([NOISE[0], NOISE[1, :, :, :1]])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = read_pixels(Record(tmp_path / "a.png", "image", ""), (16, 24), 1, 8)
    first = pictures.read_picture(tmp_path / "a.png", (16, 24))
    np.testing.assert_array_equal(read, first[None])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_of_sixteen_bits_of_grey_the_higher_eight_are_kept(tmp_path: Path, kind: str):
    grey = np.repeat(np.uint16([[0, 30000, 60000, 65535]]), 4, axis=0)
    Image.fromarray(grey).save(tmp_path / f"a.{kind}")
    read = pictures.read_picture(tmp_path / f"a.{kind}", (4, 4))
    assert read[0].tolist() == [[x] * 3 for x in (0, 117, 234, 255)]


def test_one_value_of_sixteen_bits_may_be_transparent(tmp_path: Path):
    grey = np.repeat(np.uint16([[30000, 30001]]), 2, axis=0)
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=30000)
    read = pictures.read_picture(tmp_path / "a.png", (2, 2))
    assert read[0, :, 0].tolist() == [255, 117]


def test_of_sixteen_bits_of_colour_the_higher_eight_are_kept(tmp_path: Path):
    values = np.uint16([[[30000, 60000, 65535], [0, 256, 255]]])
    frame = VideoFrame.from_ndarray(np.repeat(values, 4, axis=0), format="rgb48le")
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 2, 4, "rgb48be"
        container.mux(stream.encode(frame.reformat(format="rgb48be")))
    read = pictures.read_picture(tmp_path / "a.png", (4, 2))
    assert read[0].tolist() == [[117, 234, 255], [0, 1, 0]]


def test_palettes_greys_and_printed_colours_are_read(tmp_path: Path):
    image = Image.fromarray(
        np.repeat(np.uint8([[[255, 0, 0], [0, 0, 255]]]), 2, axis=0)
    )
    image.quantize(4).save(tmp_path / "palette.png")
    image.quantize(4).save(tmp_path / "transparent.png", transparency=0)
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("1").save(tmp_path / "bits.png")
    image.convert("CMYK").save(tmp_path / "print.tiff")

    def read(name: str) -> list[list[int]]:
        return pictures.read_picture(tmp_path / name, (2, 2))[0].tolist()

    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    assert read("palette.png") == read("print.tiff") == [red, blue]
    assert read("transparent.png") in ([white, blue], [red, white])
    assert read("grey.png") == [[76] * 3, [29] * 3]
    assert np.isin(read("bits.png"), (0, 255)).all()


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
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9")
    side = (20_000).to_bytes(4, "big")  # as large as a bomb, and a whole header
    header = b"IHDR" + 2 * side + whole[24:29]
    check = zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(whole[:12] + header + check + whole[33:])
    names = ("cut.png", "text.png", "program.eps", "bomb.png", "missing.png")
    for name in names:
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            pictures.read_picture(tmp_path / name, (16, 16))
    image = Image.open(tmp_path / "cut.png")
    with image, pytest.raises(ValueError, match="the image cannot be read"):
        pictures.fit_picture(image, (16, 16))


def test_a_gif_of_no_frame_or_too_fast_is_refused(tmp_path: Path):
    for video, fps in ((NOISE[:0], 8), (NOISE, 60)):
        with pytest.raises(ValueError, match="write an mp4"):
            pictures.write_gif(tmp_path / "a.gif", video, fps)
