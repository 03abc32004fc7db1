# SPDX-License-Identifier: Apache-2.0
"""The data set that ships with the project: drawn clips of moving shapes.

Each clip shows one shape of one colour that moves in one direction at constant speed,
is stored as an H.264 file and described by a caption such as "a red circle moves left".
There are 6 x 6 x 4 = 144 captions, so a model must combine three attributes, and
`judge.py` can say which of them a generated clip shows. Models see the clips at a
quarter of their resolution.
"""

import functools
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, UInt8

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

_SAMPLES = 4  # per pixel and axis, for smooth edges


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
    """How clips are drawn; lengths in pixels of the file, `step` in pixels per frame.

    Diameters and start positions are multiples of 2 and `grid`. The default grid of 4
    puts a shape on whole pixels at a quarter of the resolution.
    """

    size: int = 128
    frames: int = 8
    fps: int = 8
    step: int = 8
    diameter: tuple[int, int] = (48, 56)
    grid: int = 4
    crf: int = 12

    def __post_init__(self):
        room = self.size - self.diameter[1] - self.step * (self.frames - 1)
        if room < 0:
            raise ValueError(
                f"a shape of {self.diameter[1]} pixels that moves {self.step} pixels "
                f"{self.frames - 1} times leaves {self.size} pixels; use a smaller "
                "diameter or step, or fewer frames"
            )


def captions() -> tuple[Caption, ...]:
    """All 144 captions."""
    return tuple(
        itertools.starmap(Caption, itertools.product(COLOURS, SHAPES, DIRECTIONS))
    )


def parse(text: str) -> Caption:
    """The caption whose sentence is `text`; ValueError if there is none."""
    for caption in captions():
        if caption.text == text:
            return caption
    raise ValueError(
        f"{text!r} is not a caption of the embedded data set; write it like "
        f"{captions()[0].text!r}, with a colour of {', '.join(COLOURS)}, a shape of "
        f"{', '.join(SHAPES)} and a direction of {', '.join(DIRECTIONS)}"
    )


def render(
    caption: Caption, rng: np.random.Generator, settings: Settings = Settings()
) -> UInt8[np.ndarray, "f h w 3"]:
    """A drawn clip of what the caption says; diameter and start are random."""
    s = settings
    diameter = int(rng.integers(s.diameter[0] // 2, s.diameter[1] // 2 + 1)) * 2
    move = np.array(DIRECTIONS[caption.direction]) * s.step
    travel = move * (s.frames - 1)
    low = np.maximum(0, -travel)
    high = s.size - diameter - np.maximum(0, travel)
    start = rng.integers(-(-low // s.grid), high // s.grid + 1) * s.grid

    mask = _mask(caption.shape, diameter)[:, :, None]
    colour = np.array(COLOURS[caption.colour])
    patch = np.rint(BACKGROUND + mask * (colour - BACKGROUND)).astype(np.uint8)
    video = np.empty((s.frames, s.size, s.size, 3), np.uint8)
    video[:] = BACKGROUND
    for i, (y, x) in enumerate(start + move * np.arange(s.frames)[:, None]):
        video[i, y : y + diameter, x : x + diameter] = patch
    return video


def write_dataset(
    folder: str | Path, clips: int, seed: int, settings: Settings = Settings()
) -> Path:
    """Draws `clips` clips into a folder and returns the path of their manifest.

    The result depends on the arguments only; every caption is used equally often (up to
    one). A folder that already holds this very data set is used as it is, one whose
    writing was interrupted is completed.

    Raises ValueError if the folder holds anything else.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}, expected 1 or more")
    folder = Path(folder)
    about, manifest = folder / "dataset.json", folder / "manifest.jsonl"
    wanted = json.dumps({"clips": clips, "seed": seed, **asdict(settings)}, indent=1)
    if about.is_file() and about.read_text() != wanted:
        raise ValueError(
            f"{folder} holds another data set, of\n{about.read_text()}\n"
            f"expected\n{wanted}\ngive another folder, or delete this one"
        )
    if not about.is_file() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    if manifest.is_file():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    about.write_text(wanted)
    choices = captions()
    order = np.random.default_rng(seed).permutation(len(choices))
    records = []
    for i in range(clips):
        caption = choices[order[i % len(order)]]
        video = render(caption, np.random.default_rng((seed, i)), settings)
        path = folder / "clips" / f"{i:05}.mp4"
        write_video(path, video, settings.fps, crf=settings.crf)
        records.append(Record(path, "video", caption.text))
    write_manifest(manifest, records)
    return manifest


@functools.cache
def _mask(shape: str, diameter: int) -> Float[np.ndarray, "d d"]:
    """How much of each pixel of a square of width `diameter` a shape covers, 0 to 1."""
    n = diameter * _SAMPLES
    axis = (np.arange(n) + 0.5) * 2 / n - 1
    inside = _inside(shape, axis[:, None], axis[None, :])
    return reduce(inside * 1.0, "(h i) (w j) -> h w", "mean", i=_SAMPLES, j=_SAMPLES)


def _inside(
    shape: str, y: Float[np.ndarray, "n 1"], x: Float[np.ndarray, "1 n"]
) -> Bool[np.ndarray, "n n"]:
    """Which points of the square [-1, 1] x [-1, 1], y downwards, belong to a shape."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius < 1
    if shape == "ring":
        return (radius < 1) & (radius > 0.58)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.9
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) < 0.3
    if shape == "triangle":
        return (2 * abs(x) < y + 1) & (y < 0.9)
    # A five-pointed star, folded into one of its ten mirrored sectors: inside of the
    # edge from the tip at radius 1 to the notch.
    sector = np.pi / 5
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    notch = 0.42 * np.cos(sector), 0.42 * np.sin(sector)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    return (notch[0] - 1) * across > notch[1] * (along - 1)
