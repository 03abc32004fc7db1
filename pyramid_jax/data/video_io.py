# SPDX-License-Identifier: Apache-2.0
"""Video and image files as arrays of 8-bit pixels, and back.

Two conventions hold in the whole package: files and functions that touch them speak
uint8 RGB, channels last; models see float32 in [-1, 1] (`to_model`, `to_uint8`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from math import ceil
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from einops import repeat
from jaxtyping import Float, UInt8

from pyramid_jax.shapes import Array

# Pictures of fewer pixels are encoded faster without threads. Without x264's macroblock
# tree their files are the same in every run: it reads stray memory below 48 x 48.
_SMALL = 256 * 256
# ITU-T H.273 code point for BT.709 primaries, transfer curve and matrix.
_BT709 = 1
# Without these, libswscale darkens every colour by 2 to 3 of 255 on its way to a file.
_EXACT = (
    Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)


HeightWidth = tuple[int, int]


class VideoInfo(NamedTuple):
    """Height and width as they are shown, frames, and frames per second of a file."""

    height: int
    width: int
    frames: int
    fps: float


def video_info(path: str | Path) -> VideoInfo:
    """Size, length and rate of a video or image file.

    Raises:
        ValueError: a missing or broken file.
    """
    with _opened(path, "video") as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 1)
        frames = stream.frames or _length(container, fps) or 1
        for frame in container.decode(video=0):
            size = _upright((frame.height, frame.width), frame)
            return VideoInfo(*size, frames, fps)
    raise ValueError(f"{path} holds no picture; replace the file or leave it out")


def nearest_size(sizes: tuple[HeightWidth, ...], path: Path) -> HeightWidth:
    """The size whose aspect ratio is nearest to that of a video or image file.

    Raises:
        ValueError: a missing or broken file, if there is a choice.
    """
    if len(sizes) == 1:
        return sizes[0]
    height, width, *_ = video_info(path)
    return min(sizes, key=lambda s: abs(np.log(s[0] / s[1] * width / height)))


def read_video(
    path: str | Path,
    size: HeightWidth,
    frames: int,
    fps: float,
    place: float = 0.0,
) -> UInt8[np.ndarray, "f h w 3"]:
    """`frames` frames of a video file, by default the first, at `fps` and `size`.

    Frame i is the source frame shown nearest to i / fps seconds after the first one
    (the earlier of two equally near ones). Pictures are scaled until they cover
    `size`, averaging when they shrink, and cropped at the centre. Rotation stored in
    the file is applied.

    Args:
        size: height and width in pixels.
        place: where the frames begin: 0 with the first one at `fps`, 1 with the last
            from which there are enough.

    Raises:
        ValueError: a missing, broken or too short file.
    """
    _check_request(size, frames, fps)
    scaler = VideoReformatter()
    with _opened(path, "video") as container:
        spare = max(0, _length(container, fps) - frames) if place else 0
        skipped = round(place * spare)
        shown = islice(_resampled(container, skipped + frames, fps), skipped, None)
        pictures = [_fit(frame, size, scaler) for frame in shown]
    if len(pictures) < frames:
        raise ValueError(
            f"{path} has {skipped + len(pictures)} frames at {fps:g} frames per "
            f"second, expected at least {skipped + frames}; ask for fewer frames or "
            "a higher rate, or leave this file out"
        )
    return np.stack(pictures)


def read_image(path: str | Path, size: HeightWidth) -> UInt8[np.ndarray, "h w 3"]:
    """An image file scaled until it covers `size`, cropped at the centre.

    Args:
        size: height and width in pixels.

    Raises:
        ValueError: a missing or broken file.
    """
    _check_request(size, 1, 1)
    with _opened(path, "image") as container:
        for frame in container.decode(video=0):
            return _fit(frame, size, VideoReformatter())
    raise ValueError(f"{path} holds no picture; replace the file or leave it out")


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
    video = repeat(video, "f h w c -> f (h i) (w j) c", i=scale, j=scale)
    count, height, width, _ = video.shape
    if not count or height % 2 or width % 2 or not height * width:
        raise ValueError(
            f"cannot write {count} frames of {height}x{width} pixels to {path}: H.264 "
            "needs at least one frame, of even height and width; crop to even sizes "
            "or use scale=2"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "fast"}
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
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
    with _opened(path, "video") as container:
        return container.metadata.get("comment", "")


def to_model(pixels: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """8-bit pixels as float32 in [-1, 1], the range the models work in."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(pixels: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Pixels in [-1, 1] rounded to 8 bits; values outside the range are clamped."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def _check_request(size: HeightWidth, frames: int, fps: float) -> None:
    if min(size) < 1 or frames < 1 or fps <= 0:
        raise ValueError(
            f"size {size}, frames {frames}, fps {fps:g}: expected a positive height "
            "and width, frame count and rate"
        )


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[InputContainer]:
    """An open container with a video stream; its errors name the file and the cure."""
    if not Path(path).is_file():
        raise ValueError(f"{kind} {path} is not a file; correct the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                streams = ", ".join(s.type for s in container.streams) or "nothing"
                raise ValueError(
                    f"{path} holds {streams} but no {kind}; replace the file or leave "
                    "it out"
                )
            yield container
    except FFmpegError as error:
        raise ValueError(
            f"{path} cannot be decoded as {kind} ({error.strerror}); replace the file "
            "or leave it out"
        ) from error


def _resampled(
    container: InputContainer, count: int, fps: float
) -> Iterator[VideoFrame]:
    """Up to `count` decoded frames, each the nearest in time to its place at `fps`."""
    places = [Fraction(i) / Fraction(fps) for i in range(count)]
    start, shown, last = None, Fraction(0), None
    for frame in container.decode(video=0):
        if frame.pts is None or frame.time_base is None:
            raise ValueError(
                f"{container.name} has frames without time; put it into an mp4 file "
                "first, e.g. with ffmpeg -r RATE -i INPUT OUTPUT.mp4"
            )
        time = frame.pts * frame.time_base
        start = time if start is None else start
        while places and last and 2 * places[0] <= shown + time - start:
            places.pop(0)
            yield last
        if not places:
            return
        shown, last = time - start, frame
    end = shown + _duration(container.streams.video[0], last)
    while places and last and places[0] < end:
        places.pop(0)
        yield last


def _length(container: InputContainer, fps: float) -> int:
    """How many frames at `fps` a video has, by what its header says."""
    stream = container.streams.video[0]
    if stream.duration is None or stream.time_base is None:
        return 0
    return ceil(stream.duration * stream.time_base * Fraction(fps))


def _duration(stream: av.VideoStream, frame: VideoFrame | None) -> Fraction:
    """How long a stream's last frame is shown, in seconds."""
    if frame is not None and frame.duration and frame.time_base:
        return frame.duration * frame.time_base
    return 1 / stream.average_rate if stream.average_rate else Fraction(0)


def _upright(size: HeightWidth, frame: VideoFrame) -> HeightWidth:
    """Height and width, exchanged if the frame is stored lying on its side."""
    height, width = size
    return (width, height) if round(frame.rotation / 90) % 2 else (height, width)


def _fit(
    frame: VideoFrame, size: HeightWidth, scaler: VideoReformatter
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture upright, scaled to cover `size` and cropped at the centre.

    One `scaler` for all frames of a file keeps its tables: four times faster.
    """
    height, width = _upright(size, frame)
    scale = max(height / frame.height, width / frame.width)
    tall = max(height, round(frame.height * scale))
    wide = max(width, round(frame.width * scale))
    method = (Interpolation.AREA if scale < 1 else Interpolation.BICUBIC) | _EXACT
    scaled = scaler.reformat(frame, wide, tall, "rgb24", interpolation=method)
    top, left = (tall - height) // 2, (wide - width) // 2
    cropped = scaled.to_ndarray()[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(cropped, round(frame.rotation / 90)))


def _to_yuv(pixels: UInt8[np.ndarray, "h w 3"], scaler: VideoReformatter) -> VideoFrame:
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return scaler.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | _EXACT,
    )
