# SPDX-License-Identifier: Apache-2.0
"""Video files as arrays of 8-bit pixels, and back.

All frames that a player shows are read, and no others. Headers are not trusted with
that: many have no length, or a wrong one, so the packets of a file are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice, repeat
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import einops
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from pyramid_jax.data.frames import BT709, EXACT, FrameConverter, shown_size
from pyramid_jax.data.pixels import HeightWidth

# Pictures of fewer pixels are encoded faster without threads. Without x264's macroblock
# tree their files are the same in every run: it reads stray memory below 48 x 48.
_SMALL = 256 * 256
# FFmpeg's own decoders of these drop the alpha channel.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_SAME = 0.1  # relative difference between two rates of a file


class VideoInfo(NamedTuple):
    """Height and width as they are shown, frames, and frames per second of a file."""

    height: int
    width: int
    frames: int
    fps: float


class _Length(NamedTuple):
    count: int
    seconds: Fraction


def video_info(path: str | Path) -> VideoInfo:
    """Size, length and rate of a video file: at this rate it has so many frames.

    Raises:
        ValueError: a missing or broken file.
    """
    count, seconds = _length(path)
    measured = count / seconds
    with _opened(path) as (_, stream):
        rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    rate = min(rates, key=lambda rate: abs(rate - measured), default=measured)
    rate = rate if abs(rate / measured - 1) < _SAME else measured
    return VideoInfo(*video_size(path), _places(seconds, rate), float(rate))


def video_size(path: str | Path) -> HeightWidth:
    """Height and width of a video file as it is shown.

    Raises:
        ValueError: a missing or broken file.
    """
    with _opened(path) as (container, stream):
        for frame in _decoded(container, stream):
            return shown_size(frame, stream.sample_aspect_ratio)
    raise ValueError(f"{path} holds no picture; replace the file or leave it out")


def read_video(
    path: str | Path,
    size: HeightWidth,
    frames: int,
    fps: float,
    place: float = 0.0,
    least: int | None = None,
) -> UInt8[np.ndarray, "f h w 3"]:
    """`frames` frames of a video file, by default the first, as `video_frames`.

    Args:
        place: where the frames begin: 0 with the first one at `fps`, 1 with the last
            from which there are enough.
        least: a shorter file with so many frames gives all that it has; None: none may
            be shorter.

    Raises:
        ValueError: a missing, broken or too short file.
    """
    if frames < 1:
        raise ValueError(f"{frames} frames of {path}: ask for one or more")
    least = frames if least is None else least
    total = _places(_length(path).seconds, _exact(fps)) if place else frames
    for _ in range(2):
        first = round(place * max(0, total - frames))
        pictures = list(islice(video_frames(path, size, fps, first), frames))
        if len(pictures) == frames or (first == 0 and len(pictures) >= least):
            return np.stack(pictures)
        with _opened(path) as (container, stream):  # packets may promise too much
            total = max((n for _, n in _spans(container, stream, fps)), default=0)
    raise ValueError(
        f"{path} has {total} frames at {fps:g} frames per second, expected at least "
        f"{least}; ask for fewer frames or a higher rate, or leave this file out"
    )


def video_frames(
    path: str | Path, size: HeightWidth, fps: float, first: int = 0
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames of a video file from number `first` on, at `fps` and `size`.

    Frame i is the source frame shown nearest to i / fps seconds after the first one
    (the earlier of two equally near ones). Frames look as players show them: upright,
    in proportion, in the colours of BT.709. They are scaled until they cover `size`,
    averaging when they shrink, and cropped at the centre.

    Args:
        size: height and width in pixels.

    Raises:
        ValueError: a missing or broken file.
    """
    if min(size) < 1 or fps <= 0:
        raise ValueError(
            f"size {size}, fps {fps:g}: expected a positive height, width and rate"
        )
    with _opened(path) as (container, stream):
        converter = FrameConverter(size, stream.sample_aspect_ratio)
        for frame, stop in _spans(container, stream, fps):
            if stop > first:
                yield from repeat(converter.pixels(frame), stop - first)
                first = stop


def write_video(
    path: str | Path,
    video: UInt8[np.ndarray, "f h w 3"],
    fps: float,
    *,
    crf: int = 18,
    scale: int = 1,
    comment: str = "",
) -> None:
    """Writes an H.264 mp4 file (yuv420p, BT.709) that every player and browser shows.

    Args:
        crf: quality of x264, 0 (best) to 51; 18 looks like the original.
        scale: shows every pixel as a block of scale x scale, for tiny videos.
        comment: any text, which `read_video_comment` reads again.

    Raises:
        ValueError: an empty video, or an odd height or width.
    """
    if not 0 <= crf <= 51 or scale < 1 or fps <= 0:
        raise ValueError(
            f"crf {crf}, scale {scale}, fps {fps:g}: expected a crf of 0 to 51, a "
            "scale of 1 or more and a positive number of frames per second"
        )
    video = einops.repeat(video, "f h w c -> f (h i) (w j) c", i=scale, j=scale)
    count, height, width, _ = video.shape
    if not count or height % 2 or width % 2 or not height * width:
        raise ValueError(
            f"cannot write {count} frames of {height}x{width} pixels to {path}: H.264 "
            "needs at least one frame, of even height and width; crop to even sizes "
            "or use scale=2"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Players on the web start at once if the index comes first.
    options = {"movflags": "faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata["comment"] = comment
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "fast"}
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        codec.color_range = ColorRange.MPEG
        if height * width < _SMALL:
            codec.thread_count = 1
            stream.options |= {"x264-params": "mbtree=0"}
        scaler = VideoReformatter()
        for pixels in video:
            container.mux(stream.encode(_to_yuv(pixels, scaler)))
        container.mux(stream.encode(None))


def read_video_comment(path: str | Path) -> str:
    """The comment in a video file, "" if it has none.

    Raises:
        ValueError: a missing or broken file.
    """
    with _opened(path) as (container, _):
        return container.metadata.get("comment", "")


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An open file and its video; its errors name the file and the cure."""
    if not Path(path).is_file():
        raise ValueError(f"video {path} is not a file; correct the path")
    try:
        file = str(Path(path).absolute())  # which cannot look like "pipe:" or "http:"
        with av.open(file, metadata_errors="replace") as container:
            covers = Disposition.attached_pic
            kinds = [s.type for s in container.streams if not s.disposition & covers]
            stream = container.streams.best("video")
            if "video" not in kinds or stream is None or stream.codec_context is None:
                raise ValueError(
                    f"holds {', '.join(kinds) or 'nothing'} but no video that "
                    "can be decoded; replace the file or leave it out"
                )
            yield container, cast(VideoStream, stream)
    except FFmpegError as error:
        raise ValueError(
            f"{path} cannot be decoded as video ({error.strerror}); replace the file "
            "or leave it out"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    decoder: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1":
        name = _ALPHA_DECODERS.get(stream.codec.name, stream.codec.name)
        decoder = CodecContext.create(name, "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _spans(
    container: InputContainer, stream: VideoStream, fps: float
) -> Iterator[tuple[VideoFrame, int]]:
    """Decoded frames, and the number of the first frame at `fps` behind each."""
    rate, step = _exact(fps), _step(stream)
    start, shown, last = Fraction(0), Fraction(0), None
    for frame in _decoded(container, stream):
        time, begin = _time(container, frame), Fraction(0)
        if last is None:
            start = time or start
        else:
            begin = shown if time is None else time - start
            if begin <= shown:  # no time, or a wrong one
                begin = shown + step
            yield last, floor((shown + begin) / 2 * rate) + 1
        shown, last = begin, frame
    if last is not None:
        yield last, _places(shown + _duration(container, last, step), rate)


def _length(path: str | Path) -> _Length:
    """What the packets of a file say of its length; nothing is decoded."""
    with _opened(path) as (container, stream):
        step, begins, ends = _step(stream), [], []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                time = _time(container, packet)
                begins.append(len(begins) * step if time is None else time)
                ends.append(begins[-1] + _duration(container, packet, step))
    if not begins:
        raise ValueError(f"{path} holds no picture; replace the file or leave it out")
    return _Length(len(begins), max(ends) - min(begins))


def _places(seconds: Fraction, rate: Fraction) -> int:
    """How many frames at a rate begin within some seconds, which may be rounded."""
    return max(1, ceil(seconds * rate - Fraction(1, 10)))


def _exact(fps: float) -> Fraction:
    """A rate such as 30000/1001, which floats only approximate."""
    return Fraction(fps).limit_denominator(10**6)


def _step(stream: VideoStream) -> Fraction:
    """Seconds from a frame to the next where the file does not say."""
    return 1 / (stream.guessed_rate or stream.average_rate or Fraction(25))


def _time(container: InputContainer, item: VideoFrame | Packet) -> Fraction | None:
    """When a frame is shown, in seconds. AVI knows only in which order to decode."""
    stamp = item.dts if container.format.name == "avi" else item.pts
    return None if stamp is None or not item.time_base else stamp * item.time_base


def _duration(
    container: InputContainer, item: VideoFrame | Packet, step: Fraction
) -> Fraction:
    if container.format.name == "avi" or not item.duration or not item.time_base:
        return step
    return item.duration * item.time_base


def _to_yuv(pixels: UInt8[np.ndarray, "h w 3"], scaler: VideoReformatter) -> VideoFrame:
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return scaler.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | EXACT,
    )
