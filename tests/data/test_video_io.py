# SPDX-License-Identifier: Apache-2.0
"""Video and image files keep their colours, their timing and their proportions."""

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from einops import reduce, repeat

from pyramid_jax.data import video_io

RED, GREEN, BLUE, GREY = (220, 40, 40), (40, 200, 50), (50, 60, 230), (128, 128, 128)
# 8-bit YUV, halved colour resolution and compression at a low crf.
CODEC_ERROR = 4


def counting(frames: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """A video whose frame i is a plain grey of brightness 20 + 12 i."""
    grey = (20 + 12 * np.arange(frames)).astype(np.uint8)
    return repeat(grey, "f -> f h w 3", h=size[0], w=size[1])


def counted(video: np.ndarray) -> list[int]:
    """Which frames of `counting` a video shows."""
    return np.rint((reduce(video * 1.0, "f h w c -> f", "mean") - 20) / 12).tolist()


def stripes(*colours: tuple[int, int, int], side: int = 32) -> np.ndarray:
    """Squares of the given colours, from left to right."""
    return repeat(np.uint8(colours), "n c -> h (n w) c", h=side, w=side)


def assert_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> None:
    assert np.abs(pixels.astype(int) - colour).max() <= CODEC_ERROR


@pytest.fixture
def clip(tmp_path):
    """A file of 12 counted frames at 8 frames per second."""
    video_io.write_video(tmp_path / "clip.mp4", counting(12), 8, crf=4)
    return tmp_path / "clip.mp4"


def test_a_written_file_is_h264_that_players_show_in_the_right_colours(clip):
    with av.open(str(clip)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)


def test_colours_survive_a_round_trip(tmp_path):
    picture = stripes(RED, GREEN, BLUE, GREY)
    video_io.write_video(tmp_path / "a.mp4", np.stack([picture] * 3), 8, crf=4)
    video = video_io.read_video(tmp_path / "a.mp4", picture.shape[:2], 3, 8)
    for i, colour in enumerate((RED, GREEN, BLUE, GREY)):
        assert_colour(video[:, 4:-4, 32 * i + 4 : 32 * i + 28], colour)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5]),
        (4, [0, 2, 4, 6, 8, 10]),
        (16, [0, 0, 1, 1, 2, 2]),
        (12, [0, 1, 1, 2, 3, 3]),
        (5, [0, 2, 3, 5, 6, 8]),
    ],
)
def test_a_frame_is_the_source_frame_nearest_in_time(clip, fps, expected):
    assert counted(video_io.read_video(clip, (16, 16), 6, fps)) == expected


def test_the_last_frame_of_a_file_lasts_as_long_as_the_others(clip):
    assert counted(video_io.read_video(clip, (16, 16), 24, 16))[-2:] == [11, 11]
    with pytest.raises(ValueError, match="has 24 frames at 16 frames per second"):
        video_io.read_video(clip, (16, 16), 25, 16)


def test_too_few_frames_are_reported_with_both_numbers(clip):
    with pytest.raises(ValueError, match=r"clip\.mp4 has 12 frames .* at least 13"):
        video_io.read_video(clip, (16, 16), 13, 8)


@pytest.mark.parametrize("upright", [False, True])
def test_pictures_cover_the_size_and_are_cropped_at_the_centre(tmp_path, upright):
    picture = stripes(RED, GREEN, BLUE)
    picture = np.rot90(picture) if upright else picture
    video_io.write_video(tmp_path / "a.mp4", picture[None], 8, crf=4)
    video = video_io.read_video(tmp_path / "a.mp4", (16, 16), 1, 8)
    assert video.shape == (1, 16, 16, 3)
    assert_colour(video[:, 2:-2, 2:-2], GREEN)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"video .*none\.mp4 is not a file"):
        video_io.read_video(tmp_path / "none.mp4", (8, 8), 1, 8)


def test_a_broken_file_is_named(tmp_path, clip):
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.mp4 cannot be decoded as video"):
        video_io.read_video(tmp_path / "cut.mp4", (8, 8), 1, 8)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be decoded as video"):
        video_io.video_info(tmp_path / "text.mp4")


def test_a_file_of_sound_only_is_named(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"a\.wav holds audio but no video"):
        video_io.read_video(tmp_path / "a.wav", (8, 8), 1, 8)


@pytest.mark.parametrize(
    ("size", "frames", "fps"), [((0, 8), 1, 8), ((8, 8), 0, 8), ((8, 8), 1, 0)]
)
def test_an_impossible_request_is_refused(clip, size, frames, fps):
    with pytest.raises(ValueError, match=r"expected a positive|ask for one"):
        video_io.read_video(clip, size, frames, fps)


def test_odd_sizes_are_refused_with_the_remedy_and_the_remedy_works(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    with pytest.raises(ValueError, match=r"5x7 pixels.*scale=2"):
        video_io.write_video(tmp_path / "a.mp4", video, 8)
    video_io.write_video(tmp_path / "a.mp4", video, 8, scale=2)
    assert video_io.read_video(tmp_path / "a.mp4", (10, 14), 2, 8).shape[0] == 2


def test_scale_shows_every_pixel_as_a_plain_block(tmp_path):
    video = np.uint8([[[RED, GREEN], [BLUE, GREY]]])
    video_io.write_video(tmp_path / "a.mp4", video, 8, crf=4, scale=32)
    read = video_io.read_video(tmp_path / "a.mp4", (64, 64), 1, 8)[0]
    assert_colour(read[6:26, 6:26], RED)
    assert_colour(read[6:26, 38:58], GREEN)
    assert_colour(read[38:58, 6:26], BLUE)


def test_small_videos_are_encoded_without_what_varies_between_runs(tmp_path):
    """x264 notes its settings in the file; the fault itself shows only now and then."""
    video_io.write_video(tmp_path / "a.mp4", counting(3), 8)
    first = (tmp_path / "a.mp4").read_bytes()
    video_io.write_video(tmp_path / "a.mp4", counting(3), 8)
    assert b" mbtree=0 " in first
    assert (tmp_path / "a.mp4").read_bytes() == first


def test_a_video_without_frames_and_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0 frames"):
        video_io.write_video(tmp_path / "a.mp4", counting(0), 8)
    for options in ({"crf": 52}, {"crf": -1}, {"scale": 0}):
        with pytest.raises(ValueError, match="expected a crf"):
            video_io.write_video(tmp_path / "a.mp4", counting(1), 8, **options)


def test_a_lower_crf_spends_more_bytes(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for crf in (10, 40):
        video_io.write_video(tmp_path / f"{crf}.mp4", video, 8, crf=crf)
    good, bad = ((tmp_path / f"{crf}.mp4").stat().st_size for crf in (10, 40))
    assert good > 2 * bad
