# SPDX-License-Identifier: Apache-2.0
"""Bouncing pairs as arrays, without files, and as a folder of mp4 and png files."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import UInt8

from launch.drawings import is_drawn
from launch.pairs.captions import image_caption, video_caption
from launch.pairs.scene import Actor, Settings, Split, scene
from pyramid_jax.data.manifest import Kind, Record, write_manifest
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.data.video_io import write_video

DRAWING = 2  # version of scenes and captions
FILMING = Settings()
_EVERY = 5  # one of so many is an image
_CRF = 14
_WORDS = 1  # captions are drawn apart from scenes


class Pair(NamedTuple):
    """A clip, or an image as a clip of one frame, its caption and what it shows."""

    kind: Kind
    text: str
    actors: tuple[Actor, Actor]
    pixels: UInt8[np.ndarray, "f h w 3"]


def pair(
    number: int,
    seed: int = 0,
    split: Split = "training",
    settings: Settings = FILMING,
    kind: Kind | None = None,
) -> Pair:
    """The pair of a number; the same arguments give the same pair.

    Args:
        kind: every fifth is an image, the others are videos, unless it is given. Either
            shows the same scene.
    """
    kind = kind or ("image" if number % _EVERY == _EVERY - 1 else "video")
    shown = scene(number, seed, split)
    rng = np.random.default_rng((seed, number, get_args(Split).index(split), _WORDS))
    caption = video_caption if kind == "video" else image_caption
    frames = settings.frames if kind == "video" else 1
    return Pair(kind, caption(shown.actors, rng), shown.actors, shown.film(frames))


def pairs(
    seed: int = 0, split: Split = "training", settings: Settings = FILMING
) -> Iterator[Pair]:
    """All pairs of a split in the order of their numbers, without end."""
    return (pair(number, seed, split, settings) for number in count())


def texts(scenes: int = 1000) -> list[str]:
    """Captions of the first scenes, as videos and as images, for a tokenizer."""
    return [
        pair(number, settings=Settings(frames=1), kind=kind).text
        for number in range(scenes)
        for kind in get_args(Kind)
    ]


def write_pairs(
    folder: str | Path,
    clips: int,
    seed: int = 0,
    split: Split = "training",
    settings: Settings = FILMING,
) -> Path:
    """Writes the first pairs of a split into a folder; returns the manifest's path.

    A folder that holds this very data set is used as it is, or completed if its writing
    was interrupted.

    Raises:
        ValueError: no clips are asked for, or the folder holds anything else.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}, expected 1 or more")
    dataset = {"pairs": DRAWING, "clips": clips, "seed": seed, "split": split}
    folder, manifest = Path(folder), Path(folder) / "manifest.jsonl"
    if is_drawn(folder, dataset | asdict(settings)):
        return manifest
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for number in range(clips):
        each = pair(number, seed, split, settings)
        if each.kind == "video":
            path = folder / "videos" / f"{number:06}.mp4"
            write_video(path, each.pixels, settings.fps, crf=_CRF)
        else:
            path = folder / "images" / f"{number:06}.png"
            write_picture(path, each.pixels[0])
        records.append(Record(path, each.kind, each.text))
    return write_manifest(manifest, records)
