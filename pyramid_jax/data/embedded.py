# SPDX-License-Identifier: Apache-2.0
"""The data set that ships with the project: drawn clips of moving shapes.

Each is an H.264 file with a caption such as "a red circle moves left", one of 6 colours
x 6 shapes x 4 directions. `judge.py` says which of them a generated clip shows.
"""

import functools
import json
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import reduce
from jaxtyping import Float, UInt8

from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.video_io import write_video

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 50),
    "blue": (50, 70, 240),
    "yellow": (240, 220, 40),
    "cyan": (40, 215, 225),
    "magenta": (225, 50, 220),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
BACKGROUND = (24, 24, 28)


class Caption(NamedTuple):
    """What one clip shows."""

    colour: str
    shape: str
    direction: str

    @property
    def text(self) -> str:
        """The caption as a sentence."""
        return f"a {self.colour} {self.shape} moves {self.direction}"


@dataclass(frozen=True)
class Settings:
    """How clips are drawn; lengths in pixels of the file, `step` per frame.

    Clips are meant to be read at a quarter of their size. A shape crosses the centre,
    up to `jitter` off, in multiples of `grid`. Diameters are even.
    """

    size: int = 128
    frames: int = 8
    fps: int = 8
    step: int = 8
    diameter: tuple[int, int] = (48, 56)
    jitter: int = 8
    grid: int = 4
    crf: int = 12

    def __post_init__(self):
        room = self.size - self.diameter[1] - self.step * (self.frames - 1)
        if room < 2 * self.jitter:
            raise ValueError(
                f"the largest shape and its way leave {room} of {self.size} pixels, "
                f"expected 2 x jitter = {2 * self.jitter}; lower diameter, step, "
                "frames or jitter"
            )


def captions() -> tuple[Caption, ...]:
    """All 144 captions."""
    return tuple(Caption(*words) for words in product(COLOURS, SHAPES, DIRECTIONS))


def parse(text: str) -> Caption:
    """The caption whose sentence is `text`; ValueError if there is none."""
    known = {caption.text: caption for caption in captions()}
    if text not in known:
        raise ValueError(
            f"{text!r} is no caption of the embedded data set; write a COLOUR SHAPE "
            f"moves DIRECTION, of {[*COLOURS]}, {[*SHAPES]} and {[*DIRECTIONS]}"
        )
    return known[text]


def render(
    caption: Caption, rng: np.random.Generator, settings: Settings = Settings()
) -> UInt8[np.ndarray, "f h w 3"]:
    """A drawn clip of what the caption says; diameter and start are random."""
    s = settings
    diameter = 2 * int(rng.integers(s.diameter[0] // 2, s.diameter[1] // 2 + 1))
    move = np.array(DIRECTIONS[caption.direction]) * s.step
    steps = s.jitter // s.grid
    off = rng.integers(-steps, steps + 1, 2) * s.grid
    start = (s.size - diameter - move * (s.frames - 1)) // 2 + off
    contrast = np.subtract(COLOURS[caption.colour], BACKGROUND)
    patch = np.rint(BACKGROUND + _mask(caption.shape, diameter)[..., None] * contrast)
    video = np.full((s.frames, s.size, s.size, 3), BACKGROUND, np.uint8)
    for i, (y, x) in enumerate(start + move * np.arange(s.frames)[:, None]):
        video[i, y : y + diameter, x : x + diameter] = patch
    return video


def small(video: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f _ _ 3"]:
    """A drawn clip at a quarter of its size, as models see it, without an mp4."""
    means = reduce(video, "f (h i) (w j) c -> f h w c", np.mean, i=4, j=4)
    return np.rint(means).astype(np.uint8)


def write_dataset(
    folder: str | Path, clips: int, seed: int, settings: Settings = Settings()
) -> Path:
    """Draws clips into a folder and returns the path of their manifest.

    The files depend on the other arguments only; all captions are equally frequent. A
    folder that holds this very data set is used as it is, or completed if its writing
    was interrupted. Raises ValueError if it holds anything else.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}, expected 1 or more")
    folder = Path(folder)
    about, manifest = folder / "dataset.json", folder / "manifest.jsonl"
    wanted = json.dumps({"drawing": 2, "clips": clips, "seed": seed} | asdict(settings))
    if folder.exists() and any(folder.iterdir()):
        found = about.read_text() if about.is_file() else "files of another kind"
        if found != wanted:
            raise ValueError(
                f"{folder} holds {found}, expected {wanted}; give another folder"
            )
    if manifest.is_file():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    about.write_text(wanted)
    order = list(captions())
    np.random.default_rng(seed).shuffle(order)
    records = []
    for i, caption in zip(range(clips), cycle(order), strict=False):
        video = render(caption, np.random.default_rng((seed, i)), settings)
        path = folder / "clips" / f"{i:05}.mp4"
        write_video(path, video, settings.fps, crf=settings.crf)
        records.append(Record(path, "video", caption.text))
    write_manifest(manifest, records)
    return manifest


@functools.cache
def _mask(shape: str, diameter: int) -> Float[np.ndarray, "d d"]:
    """How much of each pixel of a square a shape that fills it covers, 0 to 1."""
    samples = 4  # per pixel and axis
    x = (np.arange(diameter * samples) + 0.5) * 2 / (diameter * samples) - 1
    y = x[:, None]  # downwards
    radius = np.hypot(x, y)
    # A star is a kite between a tip at radius 1 and a notch, mirrored ten times.
    sector = np.pi / 5
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    notch = 0.42 * np.sin(sector), 0.42 * np.cos(sector)
    inside = {
        "circle": radius < 1,
        "square": np.maximum(abs(x), abs(y)) < 0.9,
        "triangle": (2 * abs(x) < y + 1) & (y < 0.9),
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
        "ring": (radius < 1) & (radius > 0.58),
        "star": (1 - notch[1]) * across < notch[0] * (1 - along),
    }[shape]
    return reduce(inside * 1.0, "(h i) (w j) -> h w", "mean", i=samples, j=samples)
