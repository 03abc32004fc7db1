# SPDX-License-Identifier: Apache-2.0
"""Frames come as players show them: turned, mirrored, wide, transparent."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from einops import repeat
from PIL import ExifTags, Image

from pyramid_jax.data import video_io
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.source import nearest_size

ONE = 2**16  # in a display matrix
CORNERS = np.uint8([[[220, 40, 40], [40, 200, 50]], [[50, 60, 230], [240, 240, 240]]])
PICTURE = repeat(CORNERS, "h w c -> (h i) (w j) c", i=32, j=48)
# The matrix in a file, and what a player then does to the picture.
TURNS = {
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "transversed": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    "counterclockwise": ((0, -1, 1, 0), np.rot90),
    "enlarged": ((2, 0, 0, 2), lambda x: x),
    "nothing": ((0, 0, 0, 0), lambda x: x),
}


def write(
    path: Path, frame: VideoFrame, codec: str, pixels: str, **choices: Any
) -> Path:
    """A file of three equal frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixels
        if (matrix := choices.pop("matrix", None)) is not None:
            a, b, c, d = matrix
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])
        for name, value in choices.items():
            setattr(stream.codec_context, name, value)
        for place in range(3):
            frame.pts = place
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_rgb(path: Path, picture: np.ndarray, **choices: Any) -> Path:
    """A file that keeps a picture's colours within the error of its 8-bit YUV."""
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace="ITU601")
    return write(path, frame, "libx264", "yuv444p", **choices)


def yuv(colour: tuple[int, int, int], size: tuple[int, int]) -> VideoFrame:
    planes = repeat(np.uint8(colour), "c -> c h w", h=size[0], w=size[1])
    return VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")


def read(path: Path) -> np.ndarray:
    """The first frame in the size in which the file is shown."""
    return video_io.read_video(path, video_io.video_size(path), 1, 8)[0]


@pytest.mark.parametrize("name", TURNS)
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, name):
    entries, turned = TURNS[name]
    plain = read(write_rgb(tmp_path / "plain.mp4", PICTURE))
    matrix = [ONE * entry for entry in entries]
    shown = read(write_rgb(tmp_path / "a.mp4", PICTURE, matrix=matrix))
    np.testing.assert_array_equal(shown, turned(plain))


def test_frames_are_turned_beside_data_that_pyav_has_no_name_for(tmp_path):
    """Here the EXIF data of a photograph; other cameras store several views."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # clockwise
    Image.fromarray(PICTURE).save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = video_io.read_video(tmp_path / "a.jpg", (96, 64), 1, 8)[0]
    assert np.abs(shown.astype(int) - np.rot90(PICTURE, -1)).mean() < 3


def test_another_angle_is_refused_with_the_cure(tmp_path):
    half = round(ONE * 0.5**0.5)
    path = write_rgb(tmp_path / "a.mp4", PICTURE, matrix=(half, half, -half, half))
    with pytest.raises(ValueError, match=r"a\.mp4 is .* turned by 45 degrees.*ffmpeg"):
        video_io.video_info(path)


@pytest.mark.parametrize(
    ("aspect", "matrix", "shown"),
    [
        (Fraction(2), None, (64, 192)),
        (Fraction(1, 2), None, (64, 48)),
        (Fraction(2), (0, ONE, -ONE, 0), (192, 64)),
    ],
)
def test_pixels_may_be_wider_than_tall(tmp_path, aspect, matrix, shown):
    """Sizes, buckets and colours follow the proportions on the screen."""
    path = write_rgb(
        tmp_path / "a.mp4",
        PICTURE,
        matrix=matrix,
        sample_aspect_ratio=aspect,
    )
    assert video_io.video_info(path)[:2] == shown
    assert nearest_size(((64, 64), shown), Record(path, "video", "")) == shown
    upright = np.rot90(CORNERS, -1) if matrix else CORNERS
    tall, wide = (length // 2 for length in shown)
    expected = repeat(upright, "h w c -> (h i) (w j) c", i=tall, j=wide)
    assert np.abs(read(path).astype(int) - expected).mean() < 5


@pytest.mark.parametrize(("lines", "red"), [(64, 179), (720, 193)])
def test_without_a_tag_the_matrix_follows_the_size(tmp_path, lines, red):
    """Cr of 60 over the middle: 1.164 * (Y - 16) + 1.596 or 1.793 * 60 gives red."""
    frame = yuv((88, 128, 188), (lines, 32))
    shown = read(write(tmp_path / "a.mkv", frame, "ffv1", "yuv444p"))
    assert np.abs(shown[..., 0].astype(int) - red).max() <= 2


def test_a_tagged_matrix_is_kept(tmp_path):
    frame = yuv((88, 128, 188), (64, 32))
    path = write(tmp_path / "a.mp4", frame, "libx264", "yuv444p", colorspace=1)
    assert np.abs(read(path)[..., 0].astype(int) - 193).max() <= 3


@pytest.mark.parametrize(
    ("file", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "qtrle", "argb"),
        ("b.mov", "png", "rgba"),
        ("c.mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_transparent_parts_lie_on_white(tmp_path, file, codec, pixels):
    rgba = np.full((64, 96, 4), 90, np.uint8)
    rgba[:, :48, 3], rgba[:, 48:, 3] = 0, 255
    frame = VideoFrame.from_ndarray(rgba, format="rgba")
    shown = read(write(tmp_path / file, frame, codec, pixels)).astype(int)
    assert (shown[:, :40] >= 253).all() and np.abs(shown[:, 56:] - 90).max() <= 3


@pytest.mark.parametrize(
    "tags",
    [
        {"color_trc": 16, "color_primaries": 9, "colorspace": 9},
        {"color_trc": 18, "color_primaries": 9, "colorspace": 9},
        {"color_primaries": 9, "colorspace": 9},
    ],
)
def test_hdr_is_refused_with_the_cure(tmp_path, tags):
    frame = yuv((128, 128, 128), (64, 96)).reformat(format="yuv420p10le")
    path = write(tmp_path / "a.mp4", frame, "libx264", "yuv420p10le", **tags)
    with pytest.raises(ValueError, match=r"a\.mp4 has colours of HDR.*tonemap"):
        read(path)


def test_ten_bits_are_no_hdr(tmp_path):
    frame = yuv((126, 128, 128), (64, 96)).reformat(format="yuv420p10le")
    shown = read(write(tmp_path / "a.mp4", frame, "libx264", "yuv420p10le"))
    assert np.abs(shown.astype(int) - 128).max() <= 1
