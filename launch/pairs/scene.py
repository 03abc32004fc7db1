# SPDX-License-Identifier: Apache-2.0
"""Scenes of bouncing pairs, and their pictures at any time.

Two objects of different kinds and colours, shapes or handwritten digits, move evenly
over a drifting texture and bounce off the edges of the frame, so a scene has no end.
A scene follows from a seed, a number and a split. The held-out split has scans of
digits that the training split never shows.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from einops import reduce
from jaxtyping import Float, UInt8
from scipy import ndimage

from launch.drawings import shape_inside

Split = Literal["training", "held out"]

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
DIGITS = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
KINDS = (*SHAPES, *DIGITS)
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 50),
    "blue": (60, 80, 250),
    "yellow": (240, 220, 40),
    "cyan": (40, 215, 225),
    "magenta": (225, 50, 220),
}
MOTIONS = {"sideways": (0.0, 1.0), "up and down": (1.0, 0.0), "diagonally": (0.8, 0.8)}
TEXTURES = ("stripes", "checks", "clouds")

# Lengths in pixels, speeds in pixels per frame, colours of 255.
_SIZES = (64, 64), (64, 96)  # height and width
_WIDE = 0.25  # share of the second size
_SHAPE, _DIGIT = (17, 22), (24, 28)  # diameters
_SPEED = 1.5, 3.0
_DRIFT = 0.4, 1.4
_WAVE = 18, 36  # length of a texture's waves
_GREY, _TINT, _CONTRAST = (45, 100), 16, (10, 24)
_FINE = 4  # samples per pixel and axis; positions are multiples of one
_HELD_OUT = 5  # one of so many scans


@dataclass(frozen=True)
class Settings:
    """How scenes are filmed: frames of a clip, and frames per second."""

    frames: int = 17
    fps: int = 8

    def __post_init__(self):
        if self.frames < 1 or self.fps < 1:
            raise ValueError(
                f"frames {self.frames} and fps {self.fps} must be 1 or more; use e.g. "
                "17 frames at 8 fps"
            )


class Actor(NamedTuple):
    """One of the two objects, as a caption describes it."""

    colour: str
    kind: str
    motion: str


class Path(NamedTuple):
    """An even motion between walls: place at time 0, step per frame, room; y and x."""

    start: Float[np.ndarray, "2"]
    step: Float[np.ndarray, "2"]
    room: Float[np.ndarray, "2"]

    def place(self, time: float) -> Float[np.ndarray, "2"]:
        """Where the upper left corner of the object is."""
        way = (self.start + time * self.step) % (2 * self.room)
        return np.minimum(way, 2 * self.room - way)


class Texture(NamedTuple):
    """A drifting background: waves that are added or multiplied, in one hue.

    `wave` has a row of (y, x) radians per pixel, radians per frame and phase per wave.
    """

    kind: str
    wave: Float[np.ndarray, "waves 4"]
    base: Float[np.ndarray, "3"]
    contrast: Float[np.ndarray, "3"]


@dataclass(frozen=True)
class Scene:
    """Everything that is seen: the objects, the later one in front, and the texture."""

    size: tuple[int, int]
    actors: tuple[Actor, Actor]
    paths: tuple[Path, Path]
    masks: tuple[np.ndarray, np.ndarray]
    texture: Texture

    def film(self, frames: int) -> UInt8[np.ndarray, "f h w 3"]:
        """The first frames of the scene."""
        video = background(self.texture, self.size, frames)
        for actor, path, mask in zip(self.actors, self.paths, self.masks, strict=True):
            colour = np.array(COLOURS[actor.colour], np.float32)
            for time, frame in enumerate(video):
                place = np.rint(path.place(time) * _FINE).astype(int)
                _paint(frame, mask, place, colour)
        return np.rint(video).clip(0, 255).astype(np.uint8)


def scene(number: int, seed: int = 0, split: Split = "training") -> Scene:
    """The scene of a number; the same arguments give the same scene."""
    rng = np.random.default_rng((seed, number, get_args(Split).index(split)))
    size = _SIZES[int(rng.random() < _WIDE)]
    colours = rng.choice(list(COLOURS), 2, replace=False).tolist()
    kinds = [_random_kind(rng)]
    while len(kinds) < 2:
        if (kind := _random_kind(rng)) not in kinds:
            kinds.append(kind)
    motions = rng.choice(list(MOTIONS), 2).tolist()
    first, second = map(Actor, colours, kinds, motions)
    masks = [_mask(kind, rng, split) for kind in kinds]
    while True:
        paths = [
            _random_path(actor.motion, mask, size, rng)
            for actor, mask in zip((first, second), masks, strict=True)
        ]
        if _apart(paths, masks):
            break
    actors, texture = (first, second), _random_texture(rng)
    return Scene(size, actors, (paths[0], paths[1]), (masks[0], masks[1]), texture)


def background(
    texture: Texture, size: tuple[int, int], frames: int
) -> Float[np.ndarray, "f h w 3"]:
    """The frames of a texture alone."""
    time = np.arange(frames, dtype=np.float32)[:, None, None]
    y = np.arange(size[0], dtype=np.float32)[:, None]
    x = np.arange(size[1], dtype=np.float32)
    waves = [np.sin(a * y + b * x + c * time + d) for a, b, c, d in texture.wave]
    if texture.kind == "clouds":
        value = np.sum(waves, axis=0) / np.sqrt(len(waves))
    else:  # soft edges between two tones
        value = np.tanh(2 * np.prod(waves, axis=0))
    return (texture.base + value[..., None] * texture.contrast).astype(np.float32)


def _random_kind(rng: np.random.Generator) -> str:
    return str(rng.choice(SHAPES if rng.random() < 0.5 else DIGITS))


def _random_path(
    motion: str, mask: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> Path:
    room = np.array(size) - len(mask) / _FINE - 1
    unit = np.array(MOTIONS[motion]) * rng.choice([-1, 1], 2)
    return Path(rng.uniform(0, room), unit * rng.uniform(*_SPEED), room)


def _apart(paths: list[Path], masks: list[np.ndarray]) -> bool:
    """Whether the objects touch neither at the beginning."""
    sides = [len(mask) / _FINE for mask in masks]
    centres = [p.start + side / 2 for p, side in zip(paths, sides, strict=True)]
    return bool(np.linalg.norm(centres[0] - centres[1]) > sum(sides) / 2)


def _random_texture(rng: np.random.Generator) -> Texture:
    kind = str(rng.choice(TEXTURES))
    count = {"stripes": 1, "checks": 2, "clouds": 5}[kind]
    angle = rng.uniform(0, 2 * np.pi, count)
    if kind == "checks":
        angle[1] = angle[0] + np.pi / 2
    length = rng.uniform(*_WAVE, count)
    drift, heading = rng.uniform(*_DRIFT), rng.uniform(0, 2 * np.pi)
    pace = drift * np.cos(angle - heading)
    columns = np.sin(angle), np.cos(angle), pace, rng.uniform(0, length)
    wave = np.stack(columns, axis=1) * (2 * np.pi / length)[:, None]
    base = rng.uniform(*_GREY) + rng.uniform(-_TINT, _TINT, 3)
    contrast = rng.uniform(*_CONTRAST) + rng.uniform(-_TINT, _TINT, 3) / 3
    return Texture(kind, wave, base, contrast)


# ------------------------------------------------------------------------------ masks


def _paint(
    frame: Float[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "_ _"],
    place: np.ndarray,
    colour: np.ndarray,
) -> None:
    """Paints an object into a frame; `mask` and `place` are in finer pixels."""
    (y, x), (dy, dx) = place // _FINE, place % _FINE
    side = len(mask) // _FINE + 1
    fine = np.zeros((side * _FINE, side * _FINE), np.float32)
    fine[dy : dy + len(mask), dx : dx + len(mask)] = mask
    cover = reduce(fine, "(h i) (w j) -> h w 1", "mean", i=_FINE, j=_FINE)
    region = frame[y : y + side, x : x + side]
    region += cover * (colour - region)


def _mask(
    kind: str, rng: np.random.Generator, split: Split
) -> Float[np.ndarray, "_ _"]:
    """How much of each finer pixel of a square an object covers, 0 to 1."""
    low, high = _SHAPE if kind in SHAPES else _DIGIT
    side = int(rng.integers(low, high + 1)) * _FINE
    if kind in SHAPES:
        return _shape(kind, side)
    scans = _scans(split)[DIGITS.index(kind)]
    scan = scans[rng.integers(len(scans))] / 16
    smooth: Any = ndimage.zoom(
        scan, side / 8, order=3, mode="grid-constant", grid_mode=True
    )
    return ((smooth - 0.3) / 0.25).clip(0, 1).astype(np.float32)


@functools.cache
def _shape(kind: str, side: int) -> Float[np.ndarray, "_ _"]:
    return shape_inside(kind, side).astype(np.float32)


@functools.cache
def _scans(split: Split) -> tuple[np.ndarray, ...]:
    """The scans of every digit, `n 8 8` each, values to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "handwritten digits need scikit-learn; run pip install 'pyramid_jax[demo]'"
        ) from error
    loaded: Any = load_digits()
    images, labels = loaded.images, loaded.target
    kept = (np.arange(len(labels)) % _HELD_OUT == 0) == (split == "held out")
    return tuple(images[kept & (labels == digit)] for digit in range(10))
