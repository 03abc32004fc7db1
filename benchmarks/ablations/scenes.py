# SPDX-License-Identifier: Apache-2.0
"""Square bouncing pairs: training files, and held-out captions with real clips."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from einops import reduce

from launch.drawings import is_drawn
from launch.evaluate.judges import Asked
from launch.evaluate.metrics import Clip
from launch.pairs.dataset import DRAWING, Pair, pair
from launch.pairs.scene import Settings, Split
from pyramid_jax.data.manifest import Kind, Record, write_manifest
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.data.video_io import write_video

SIDE, JUDGED = 32, 64  # pixels that models make, and that the judge looks at
FILMED = Settings(frames=17)  # at 8 frames per second
_CRF = 12


class Rate(NamedTuple):
    """How many frames a clip has, which are `every`-th ones of what is drawn."""

    frames: int
    every: int

    @property
    def fps(self) -> int:
        return FILMED.fps // self.every


SLOW, FAST = Rate(5, 4), Rate(9, 2)


def write_scenes(folder: str | Path, scenes: int, rate: Rate = SLOW) -> Path:
    """Draws the training scenes, as videos and as images; returns the folder.

    A folder that holds them is used as it is.
    """
    folder = Path(folder)
    dataset = {"squares of pairs": DRAWING, "scenes": scenes, "every": rate.every}
    if is_drawn(folder, dataset):
        return folder
    (folder / "images").mkdir(exist_ok=True)
    videos, images = [], []
    for number, shown in enumerate(islice(squares("training", 0, "video"), scenes)):
        path = folder / "videos" / f"{number:05}.mp4"
        write_video(path, shown.pixels[:: rate.every], rate.fps, crf=_CRF)
        videos.append(Record(path, "video", shown.text))
    for number, shown in enumerate(islice(squares("training", 0, "image"), scenes)):
        path = folder / "images" / f"{number:05}.png"
        write_picture(path, shown.pixels[0])
        images.append(Record(path, "image", shown.text))
    write_manifest(folder / "videos.jsonl", videos)
    write_manifest(folder / "images.jsonl", images)
    (folder / "manifest.jsonl").touch()  # all is drawn
    return folder


def asked(number: int, seed: int, kind: Kind, rate: Rate = SLOW) -> list[Asked]:
    """Held-out captions, with real clips as large as the models' are."""
    shown = islice(squares("held out", seed, kind), number)
    return [
        Asked(each.text, each.actors, small(each.pixels[:: rate.every]))
        for each in shown
    ]


def squares(split: Split, seed: int, kind: Kind) -> Iterator[Pair]:
    """The square pairs of a split, without end."""
    numbers = (pair(number, seed, split, FILMED, kind) for number in count())
    return (each for each in numbers if each.pixels.shape[2] == each.pixels.shape[1])


def small(clip: Clip) -> Clip:
    """A drawn clip at the size of the models'."""
    scale, pixels = clip.shape[1] // SIDE, clip.astype(np.float32)
    means = reduce(pixels, "f (h i) (w j) c -> f h w c", "mean", i=scale, j=scale)
    return np.rint(means).astype(np.uint8)


def enlarged(clips: Sequence[Clip]) -> list[Clip]:
    """Clips at the size that the judge has learnt."""
    size = JUDGED, JUDGED

    def enlarge(frame: np.ndarray) -> np.ndarray:
        return cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)

    return [np.stack([enlarge(frame) for frame in clip]) for clip in clips]
