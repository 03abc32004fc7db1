# SPDX-License-Identifier: Apache-2.0
"""What a data worker does: from a record of the manifest to one clean training example.

Examples are numbered through the whole run. The number alone decides the stage, the
unit and whether the caption is dropped, so a run can be repeated, divided among hosts
and workers, and resumed.
"""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float, Int, Shaped, UInt8

from pyramid_jax import layout as layouts
from pyramid_jax import pyramid
from pyramid_jax.data.captions import Caption, Captions
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.video_io import read_image, read_video, to_model
from pyramid_jax.layout import Clip, Layout

HeightWidth = tuple[int, int]  # height and width
Load = Callable[
    [Record, HeightWidth], np.ndarray
]  # a latent "t h w c", or 8-bit pixels


class Example(NamedTuple):
    """One segment with its caption (`captions.Caption`), before packing.

    `video` is a structured array with the fields of `layout.Segment`. Lengths differ
    from example to example, so the axes have no letters.
    """

    video: Shaped[np.ndarray, "_"]
    text: Shaped[np.ndarray, "..."]
    stage: Int[np.ndarray, "1"]
    pooled: Float[np.ndarray, "1 _"]


class Failure(NamedTuple):
    """A record that can not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Curriculum:
    """Which stage and unit each example of a host trains, and whether it has a caption.

    Args:
        stages: of the pyramid.
        pattern: the stages of a group of successive examples, e.g. (0, 1, 1, 2).
        units: of the configured video; None trains whole sequences.
        dropout: probability of an empty caption.
        shard: index and count of the hosts.
    """

    stages: int
    pattern: tuple[int, ...]
    units: int | None
    dropout: float
    seed: int
    shard: tuple[int, int]

    def stage(self, index: int) -> int:
        """The stage of example `index`."""
        return self.pattern[index % len(self.pattern)]

    def unit(self, index: int, frames: int, frames_per_unit: int) -> int | None:
        """The unit of example `index`, whose latent has `frames`; None: all at once."""
        if self.units is None:
            return None
        available = layouts.units(frames, frames_per_unit)
        host, hosts = self.shard
        turn = index // len(self.pattern) * hosts + host
        fine, coarser = layouts.balanced_units(turn, self.units, available)
        return fine if self.stage(index) == self.stages - 1 else coarser

    def drops_caption(self, index: int) -> bool:
        """Whether example `index` is trained without its caption."""
        host, hosts = self.shard
        rng = np.random.default_rng((self.seed, index * hosts + host))
        return bool(rng.random() < self.dropout)


@dataclass(frozen=True)
class Shuffled:
    """An endless list of the records, every epoch in another order."""

    records: tuple[Record, ...]
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Record:
        epoch, place = divmod(index, len(self.records))
        return self.records[_order(self.seed, epoch, len(self.records))[place]]


class Kept:
    """Arrays by key; the last ones used stay in memory.

    Args:
        room: bytes of memory.
    """

    def __init__(self, room: int):
        self._room = room
        self._kept: OrderedDict[Hashable, list[np.ndarray]] = OrderedDict()

    def get(
        self, key: Hashable, make: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """The arrays of a key, made if they are not there."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        self._kept[key] = made
        self._room -= sum(array.nbytes for array in made)
        while self._room < 0:
            _, oldest = self._kept.popitem(last=False)
            self._room += sum(array.nbytes for array in oldest)
        return made


class Clips:
    """The pyramids of the records' latents; the last ones used stay in memory.

    Args:
        load: gives the latent of a record at a size, or its pixels in 8 bits.
        sizes: a record is loaded at the one that is nearest to its own aspect ratio.
        stages: of the pyramid.
        room: bytes of memory.
    """

    def __init__(
        self, load: Load, sizes: tuple[HeightWidth, ...], stages: int, room: int
    ):
        self._load, self._sizes, self._stages = load, sizes, stages
        self._kept = Kept(room)

    def __getitem__(self, record: Record) -> list[Float[np.ndarray, "t _ _ c"]]:
        """A record's pyramid, coarsest level first; ValueError for a bad file."""
        return self._kept.get(record.path, lambda: self._levels(record))

    def _levels(self, record: Record) -> list[Float[np.ndarray, "t _ _ c"]]:
        latent = self._load(record, nearest(self._sizes, record.path))
        if latent.dtype == np.uint8:
            latent = to_model(latent)
        return [np.asarray(x) for x in pyramid.levels(latent, self._stages)]


@dataclass(frozen=True)
class Pixels:
    """Loads what pixel-space models train on: the frames of a file, one of an image."""

    frames: int
    fps: float

    def __call__(
        self, record: Record, size: HeightWidth
    ) -> UInt8[np.ndarray, "t h w 3"]:
        if record.kind == "image":
            return read_image(record.path, size)[None]
        return read_video(record.path, size, self.frames, self.fps)


@dataclass(frozen=True)
class Maker:
    """Makes example `index` of a host from a record; a `Failure` if that can not be.

    Args:
        tokens, text_tokens: of the longest video and caption that fit a row.
    """

    clips: Clips
    plan: Curriculum
    layout: Layout
    captions: Captions
    tokens: int
    text_tokens: int

    def __call__(self, index: int, record: Record) -> Example | Failure:
        try:
            return self._example(index, record)
        except (ValueError, OSError) as error:
            return Failure(str(record.path), str(error))

    def _example(self, index: int, record: Record) -> Example:
        caption = self._caption(index, record)
        levels = self.clips[record]
        stage = self.plan.stage(index)
        unit = self.plan.unit(index, len(levels[0]), self.layout.frames_per_unit)
        shapes = tuple(level.shape for level in levels)
        form = _form(shapes, stage, unit, self.layout)
        if len(form.places) > self.tokens:
            raise ValueError(
                f"a latent of shape {shapes[-1]} makes a segment of {len(form.places)} "
                f"tokens, but a row has {self.tokens}; raise tokens"
            )
        video = form.places.copy()
        video["clean"], video["coarser"] = layouts.segment_values(
            levels, form.chosen, self.layout.patch
        )
        number = np.array([stage], np.int32)
        return Example(video, caption.tokens, number, caption.pooled)

    def _caption(self, index: int, record: Record) -> Caption:
        caption = self.captions(record, self.plan.drops_caption(index))
        if len(caption.tokens) > self.text_tokens:
            raise ValueError(
                f"the caption of {record.path} has {len(caption.tokens)} tokens, but a "
                f"row has {self.text_tokens}; shorten it or raise text_tokens"
            )
        return caption


def choose(
    frames: int, stage: int, unit: int | None, frames_per_unit: int
) -> tuple[Clip, ...]:
    """The clips of a segment: a unit with its history, or all frames if None."""
    if unit is None:
        return (Clip(stage, np.arange(frames)),)
    return layouts.compact(layouts.clips(stage, unit, unit + 1, frames_per_unit))


def nearest(sizes: tuple[HeightWidth, ...], path: Path) -> HeightWidth:
    """The size whose aspect ratio is nearest to that of a file's pictures."""
    if len(sizes) == 1:
        return sizes[0]
    height, width = _picture(path)

    def distance(size: HeightWidth) -> float:
        return abs(np.log(size[0] / size[1] * width / height))

    return min(sizes, key=distance)


class _Form(NamedTuple):
    """What all segments of one size, stage and unit have in common."""

    chosen: tuple[Clip, ...]
    places: Shaped[np.ndarray, "n"]  # an `Example.video` without values


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, "_"]:
    # perf: grain's own shuffle takes milliseconds per record of a small data set.
    return np.random.default_rng((seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=4096)
def _form(
    shapes: tuple[tuple[int, ...], ...], stage: int, unit: int | None, layout: Layout
) -> _Form:
    frames, *_, channels = shapes[0]
    chosen = choose(frames, stage, unit, layout.frames_per_unit)
    grids = [(h // layout.patch, w // layout.patch) for _, h, w, _ in shapes]
    position, frame, current = layouts.segment_places(grids, chosen, layout)
    width = layout.patch**2 * channels
    fields = [
        ("clean", np.float32, width),
        ("coarser", np.float32, width),
        ("position", np.float32, 3),
        ("frame", np.int32),
        ("current", np.bool_),
    ]
    places = np.zeros(len(frame), fields)
    places["position"], places["frame"], places["current"] = position, frame, current
    return _Form(chosen, places)


def _picture(path: Path) -> HeightWidth:
    """Height and width of a file's pictures as they are shown."""
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
    except (FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{path} shows no picture ({error}); replace the file or leave it out"
        ) from error
    upright = round(frame.rotation / 90) % 2 == 0
    return (frame.height, frame.width) if upright else (frame.width, frame.height)
