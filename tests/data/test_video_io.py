# SPDX-License-Identifier: Apache-2.0
"""Video and image files keep their colours, their timing and their proportions."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.stream import Disposition
from av.video.frame import VideoFrame
from einops import reduce, repeat
from PIL import Image

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


def test_the_index_of_a_written_file_comes_first(clip):
    content = clip.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")


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


def test_a_shorter_file_gives_all_that_it_has_if_that_is_enough(clip):
    for place in (0.0, 0.5, 1.0):
        read = video_io.read_video(clip, (16, 16), 20, 8, place, least=12)
        assert counted(read) == list(range(12))
    assert counted(video_io.read_video(clip, (16, 16), 5, 8, least=3)) == [*range(5)]
    with pytest.raises(ValueError, match=r"has 12 frames .* at least 13"):
        video_io.read_video(clip, (16, 16), 20, 8, least=13)


@pytest.mark.parametrize("upright", [False, True])
def test_pictures_cover_the_size_and_are_cropped_at_the_centre(tmp_path, upright):
    picture = stripes(RED, GREEN, BLUE)
    picture = np.rot90(picture) if upright else picture
    video_io.write_video(tmp_path / "a.mp4", picture[None], 8, crf=4)
    video = video_io.read_video(tmp_path / "a.mp4", (16, 16), 1, 8)
    assert video.shape == (1, 16, 16, 3)
    assert_colour(video[:, 2:-2, 2:-2], GREEN)


def write_as(path: Path, codec: str, rate: int = 8, **choices: Any) -> Path:
    """A file of 12 counted frames in some container; `times` are in 1 / `rate` s."""
    times = choices.pop("times", range(12))
    with av.open(str(path), "w", **choices) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        for place, picture in zip(times, counting(12), strict=True):
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("b.webm", "libvpx"),  # with packets that are not shown
        ("a.avi", "libx264"),  # which has no times for B-frames, and counts fields
        ("b.avi", "mpeg4"),
        ("a.ts", "libx264"),  # which does not begin at 0
        ("a.flv", "libx264"),
        ("a.h264", "libx264"),  # which has no times at all
    ],
)
def test_any_container_is_read_to_its_end(tmp_path, name, codec):
    path = write_as(tmp_path / name, codec)
    assert video_io.video_info(path) == (32, 32, 12, 8.0)
    shown = list(video_io.video_frames(path, (32, 32), 8))
    assert counted(np.stack(shown)) == list(range(12))
    last = video_io.read_video(path, (32, 32), 4, 8, place=1.0)
    np.testing.assert_array_equal(last, shown[-4:])


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_animations_are_videos(tmp_path, kind):
    first, *others = (Image.fromarray(frame) for frame in counting(12))
    path = tmp_path / f"a.{kind.lower()}"
    first.save(path, kind, save_all=True, append_images=others, duration=120)
    assert video_io.video_info(path) == (32, 32, 12, 25 / 3)
    assert counted(video_io.read_video(path, (32, 32), 12, 25 / 3)) == list(range(12))


def test_frames_that_an_edit_list_cuts_off_are_not_read(tmp_path, clip):
    """As after a cut without encoding: what comes before 0 is stored but not shown."""
    with av.open(str(clip)) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts -= 3 * packet.duration
                packet.dts -= 3 * packet.duration
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 12
    assert video_io.video_info(tmp_path / "a.mp4") == (32, 32, 9, 8.0)
    shown = video_io.read_video(tmp_path / "a.mp4", (32, 32), 9, 8)
    assert counted(shown) == list(range(3, 12))


def test_a_header_with_a_wrong_rate_is_not_believed(tmp_path):
    """Recorders of browsers write 1,000 frames per second."""
    times = [125 * place + place % 2 for place in range(12)]
    path = write_as(tmp_path / "a.mkv", "libx264", rate=1000, times=times)
    height, width, frames, fps = video_io.video_info(path)
    assert (height, width, frames) == (32, 32, 12) and fps == pytest.approx(8, rel=0.1)
    assert len(list(video_io.video_frames(path, (32, 32), fps))) == 12


def test_times_that_run_backwards_are_replaced(tmp_path):
    """Two recordings in one file: the second begins at 0 again."""
    path = write_as(tmp_path / "a.ts", "mpeg2video", rate=25)
    (tmp_path / "two.ts").write_bytes(2 * path.read_bytes())
    shown = list(video_io.video_frames(tmp_path / "two.ts", (32, 32), 25))
    assert counted(np.stack(shown)) == 2 * list(range(12))


def test_packets_that_promise_too_much_are_not_believed(clip, monkeypatch):
    monkeypatch.setattr(
        video_io, "_length", lambda _: video_io._Length(20, Fraction(3))
    )
    shown = video_io.read_video(clip, (16, 16), 4, 8, place=1.0)
    assert counted(shown) == [8, 9, 10, 11]


def test_a_cover_is_no_video(tmp_path, clip):
    with av.open(str(tmp_path / "a.mkv"), "w") as target, av.open(str(clip)) as source:
        cover = target.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        stream = target.add_stream_from_template(source.streams.video[0])
        target.mux(cover.encode(VideoFrame(64, 64, "yuvj420p")))
        target.mux(cover.encode(None))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert video_io.video_info(tmp_path / "a.mkv") == (32, 32, 12, 8.0)


def test_names_in_a_file_may_be_of_another_time(tmp_path):
    path = write_as(tmp_path / "a.avi", "mpeg4", options={})
    old = path.read_bytes().replace(b"Lavf", b"L\xf6wf")
    path.write_bytes(old)
    assert video_io.video_info(path).frames == 12


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
