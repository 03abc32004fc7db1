# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: drawn clips of moving shapes, a tokenizer, and a judge.

Each clip is an H.264 file with a caption such as "a red circle moves left", one of 6
colours x 6 shapes x 4 directions; the tokenizer is trained on the captions. The judge
says what a generated clip shows: it looks at the first and the last frame, for one
compact object that is the same in both, and learns shapes from clips that it draws
itself, never from training data.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from launch.drawings import is_drawn, shape_inside
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
END = "</s>"  # the token that ends a text

# Lengths in pixels, colours and contrast of 255.
_SEED = 2024, 10, 8  # of the judge's own drawings; seeds of data sets have two parts
_DRAWN = 4  # drawings per caption
_NOISE = 20  # its deviation in these drawings
_VISIBLE = 70  # contrast with the background from which a pixel belongs to an object
_AREA = 25, 240  # of an object
_OFF_COLOUR = 110  # distance from which a colour is none of the palette
_TRAVEL = 7  # half the way of a real clip
_VIEW = 12  # side of the normalised picture of an object


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
    """The caption whose sentence is `text`.

    Raises:
        ValueError: there is none.
    """
    by_text = {caption.text: caption for caption in captions()}
    if text not in by_text:
        raise ValueError(
            f"{text!r} is no caption of the embedded data set; write a COLOUR SHAPE "
            f"moves DIRECTION, of {[*COLOURS]}, {[*SHAPES]} and {[*DIRECTIONS]}"
        )
    return by_text[text]


def render(
    caption: Caption, rng: np.random.Generator, settings: Settings = Settings()
) -> UInt8[np.ndarray, "f h w 3"]:
    """Draws a clip of what a caption says; diameter and start are random."""
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
    was interrupted.

    Raises:
        ValueError: the folder holds anything else.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}, expected 1 or more")
    dataset = {"drawing": 2, "clips": clips, "seed": seed} | asdict(settings)
    folder, manifest = Path(folder), Path(folder) / "manifest.jsonl"
    if is_drawn(folder, dataset):
        return manifest
    order = list(captions())
    np.random.default_rng(seed).shuffle(order)
    records = []
    for i, caption in zip(range(clips), cycle(order), strict=False):
        video = render(caption, np.random.default_rng((seed, i)), settings)
        path = folder / "clips" / f"{i:05}.mp4"
        write_video(path, video, settings.fps, crf=settings.crf)
        records.append(Record(path, "video", caption.text))
    return write_manifest(manifest, records)


def train_tokenizer(captions: Iterable[str], vocabulary: int, path: str | Path) -> Path:
    """Trains a byte-level BPE tokenizer on captions and writes its tokenizer.json.

    Bytes are its base, so it encodes any text; words that the captions repeat become
    one token. Each text ends with the token `</s>`, so the empty prompt has one.

    Raises:
        ValueError: the vocabulary has no room for every byte.
    """
    if vocabulary < 257:
        raise ValueError(
            f"vocabulary {vocabulary} must hold 256 bytes and {END}; use 257 or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return Path(path)


class Verdict(NamedTuple):
    """What a clip shows; None for what cannot be seen."""

    colour: str | None
    shape: str | None
    direction: str | None


def judge(clip: UInt8[np.ndarray, "f 32 32 3"]) -> Verdict:
    """The colour, shape and direction that are seen in a clip.

    Guessing scores 1/6, 1/6 and 1/4 at most; a clip without one clear object scores
    nothing.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    first, last = _object(clip[0]), _object(clip[-1])
    if first is None or last is None:
        return Verdict(None, None, None)
    colour, colour_after = _colour(clip[0][first]), _colour(clip[-1][last])
    shape, shape_after = _classifier()([_view(first), _view(last)]).tolist()
    return Verdict(
        colour if colour == colour_after else None,
        shape if shape == shape_after else None,
        _direction(first, last),
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval (Wilson) of a rate that was measured in `n` trials.

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(
            f"{successes} successes of {n}: expected 0 <= successes <= n > 0"
        )
    z = 1.959964
    centre = (successes + z * z / 2) / (n + z * z)
    spread = math.sqrt(successes * (n - successes) / n + z * z / 4) * z / (n + z * z)
    return max(0.0, centre - spread), min(1.0, centre + spread)


@functools.cache
def _mask(shape: str, diameter: int) -> Float[np.ndarray, "d d"]:
    """How much of each pixel of a square a shape that fills it covers, 0 to 1."""
    samples = 4  # per pixel and axis
    inside = shape_inside(shape, diameter * samples)
    return reduce(inside * 1.0, "(h i) (w j) -> h w", "mean", i=samples, j=samples)


def _object(frame: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"] | None:
    """The largest connected object of a frame, None if it has no sensible size."""
    contrast = abs(frame.astype(int) - BACKGROUND).max(-1)
    labelled: Any = ndimage.label(contrast > _VISIBLE)
    labels, count = labelled
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + sizes.argmax() if _AREA[0] <= sizes.max() <= _AREA[1] else None


def _view(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "p"]:
    """The object's bounding square, stretched to _VIEW x _VIEW values from 0 to 1."""
    y, x = np.nonzero(mask)
    middle = (y.max() + y.min()) / 2, (x.max() + x.min()) / 2
    side = 1 + max(np.ptp(y), np.ptp(x))
    steps = ((np.arange(_VIEW) + 0.5) / _VIEW - 0.5) * side
    places = np.meshgrid(middle[0] + steps, middle[1] + steps, indexing="ij")
    view = ndimage.map_coordinates(mask.astype(np.float32), places, order=1)
    return rearrange(view, "h w -> (h w)")


def _colour(pixels: UInt8[np.ndarray, "n 3"]) -> str | None:
    """The palette's colour nearest to the median pixel, if any is near."""
    offsets = np.array(list(COLOURS.values())) - np.median(pixels, axis=0)
    distances = np.linalg.norm(offsets, axis=1)
    nearest = distances.argmin()
    return list(COLOURS)[nearest] if distances[nearest] < _OFF_COLOUR else None


def _direction(
    first: Bool[np.ndarray, "h w"], last: Bool[np.ndarray, "h w"]
) -> str | None:
    """Where the object's centre went, if far enough and more or less straight."""
    move = np.argwhere(last).mean(0) - np.argwhere(first).mean(0)
    for name, unit in DIRECTIONS.items():
        along = move @ unit
        across = np.linalg.norm(move - along * np.array(unit))
        if along >= max(_TRAVEL, 2 * across):
            return name
    return None


@functools.cache
def _classifier() -> Callable[[list[np.ndarray]], np.ndarray]:
    """Names the shapes of views; learnt in about a second from drawn, noisy frames."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "the judge needs scikit-learn; run pip install 'pyramid_jax[demo]'"
        ) from error
    rng, views, names = np.random.default_rng(_SEED), [], []
    for caption in captions() * _DRAWN:
        drawn = 1.0 * render(caption, rng)[0]
        frame = reduce(drawn, "(h i) (w j) c -> h w c", "mean", i=4, j=4)
        noisy = np.clip(frame + rng.normal(0, _NOISE, frame.shape), 0, 255)
        if (mask := _object(noisy.astype(np.uint8))) is not None:
            views.append(_view(mask))
            names.append(caption.shape)
    return SVC(C=10).fit(views, names).predict
