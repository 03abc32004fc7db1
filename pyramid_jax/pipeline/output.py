# SPDX-License-Identifier: Apache-2.0
"""The videos that a pipeline returns: frames, files of them, a view in a notebook."""

import base64
import html
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pyramid_jax.data import pictures
from pyramid_jax.data.pixels import to_model, to_uint8

KINDS = ("uint8", "float32", "pil")  # of frames
VIEW = 256  # pixels of a small video's smaller side in a notebook


def check_kind(kind: str) -> None:
    """Raises ValueError unless it is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"output {kind!r} is unknown; use one of {', '.join(KINDS)}")


def collect_frames(pieces: Iterable[Float[np.ndarray, "b _ h w 3"]], kind: str) -> Any:
    """Pixels in [-1, 1], piece after piece in time, as the frames of `VideoOutput`."""
    if kind == "float32":
        pixels = np.concatenate([np.clip(x, -1, 1) for x in pieces], axis=1)
        return (pixels.astype(np.float32) + 1) / 2
    frames = np.concatenate([to_uint8(x) for x in pieces], axis=1)
    if kind == "uint8":
        return frames
    return [[Image.fromarray(frame) for frame in video] for video in frames]


def with_given(
    pieces: Iterable[Float[np.ndarray, "b _ h w 3"]],
    given: UInt8[np.ndarray, "_ f h w 3"] | None,
) -> Iterator[Float[np.ndarray, "b _ h w 3"]]:
    """Pixels, piece after piece, the first of which are those of a given video."""
    begin = 0
    for piece in pieces:
        end = begin + piece.shape[1]
        if given is not None and begin < given.shape[1]:
            kept = to_model(given[:, begin:end])
            kept = np.broadcast_to(kept, (len(piece), *kept.shape[1:]))
            piece = np.concatenate([kept, piece[:, kept.shape[1] :]], axis=1)
        begin = end
        yield piece


@dataclass(frozen=True)
class VideoOutput:
    """Videos and images with what they were made from.

    Attributes:
        frames: `videos frames height width 3` in 8 bits or, if asked for, as float32
            in [0, 1], or a list of PIL images for every video.
        prompts: one for every video.
        seed: of the first video; the others count up.
        fps: frames per second.
    """

    frames: Any
    prompts: tuple[str, ...]
    seed: int
    fps: float

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        count, size = len(self.frames[0]), self.in_8_bits().shape[2:4]
        return (
            f"VideoOutput({len(self)} x {count} frames of {size[0]}x{size[1]} pixels, "
            f"{self.fps:g} per second, seed {self.seed})"
        )

    def save(self, path: str | Path) -> list[Path]:
        """Writes an mp4, gif or png file, as the suffix says; returns all files.

        Several videos become path_0, path_1, ... before the suffix.

        Raises:
            ValueError: an unknown suffix, or a png file for more than one frame.
        """
        path, videos = Path(path), self.in_8_bits()
        if path.suffix not in (".mp4", ".gif", ".png"):
            raise ValueError(
                f"{path} has none of the suffixes mp4, gif and png; use one"
            )
        if path.suffix == ".png" and videos.shape[1] > 1:
            raise ValueError(
                f"a png file holds one frame, each video has {videos.shape[1]}; write "
                "an mp4 or a gif file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path]
        if len(videos) > 1:
            numbers = range(len(videos))
            files = [path.with_stem(f"{path.stem}_{number}") for number in numbers]
        for file, video in zip(files, videos, strict=True):
            if path.suffix == ".mp4":
                _write_mp4(file, video, self.fps)
            elif path.suffix == ".gif":
                pictures.write_gif(file, video, self.fps)
            else:
                pictures.write_picture(file, video[0])
        return files

    def _repr_html_(self) -> str:
        """All videos beside each other, with their prompts, for a notebook."""
        views = map(self._view, self.in_8_bits(), self.prompts)
        return f'<div style="display: flex; flex-wrap: wrap">{"".join(views)}</div>'

    def _view(self, video: UInt8[np.ndarray, "f h w 3"], prompt: str) -> str:
        suffix = ".png" if len(video) == 1 else ".mp4"
        scale = max(1, VIEW // min(video.shape[1:3]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"view{suffix}"
            if suffix == ".png":
                pictures.write_picture(path, video[0])
            else:
                _write_mp4(path, video, self.fps, scale)
            data = base64.b64encode(path.read_bytes()).decode()
        shown = f'width="{video.shape[2] * scale}" style="image-rendering: pixelated"'
        if suffix == ".png":
            element = f'<img src="data:image/png;base64,{data}" {shown}>'
        else:
            source = f"data:video/mp4;base64,{data}"
            element = f'<video src="{source}" {shown} autoplay loop muted></video>'
        return (
            f'<figure style="margin: 4px">{element}'
            f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
        )

    def in_8_bits(self) -> UInt8[np.ndarray, "b f h w 3"]:
        """The frames in 8 bits, whatever their kind."""
        if isinstance(self.frames, np.ndarray) and self.frames.dtype == np.uint8:
            return self.frames
        if isinstance(self.frames, np.ndarray):
            return to_uint8(2 * self.frames - 1)
        return np.array([[np.asarray(x) for x in video] for video in self.frames])


def _write_mp4(
    path: Path, video: UInt8[np.ndarray, "f h w 3"], fps: float, scale: int = 1
) -> None:
    """Imports PyAV here: only files need it, and machines for sampling may lack it."""
    from pyramid_jax.data import video_io

    video_io.write_video(path, video, fps, scale=scale)
