# SPDX-License-Identifier: Apache-2.0
"""Clips and pictures in pixels, for the training of a VAE.

The last `held_out` records of a manifest are never trained on; `part="held out"` reads
those instead.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from pyramid_jax.data.examples import Failure, HeightWidth, Kept
from pyramid_jax.data.manifest import Record, read_manifest
from pyramid_jax.data.source import RecordSource, ahead
from pyramid_jax.data.video_io import read_image, read_video
from pyramid_jax.shapes import Array

Part = Literal["training", "held out"]


class Footage(NamedTuple):
    """A batch of 8-bit pixels: clips, and pictures, which are clips of one frame."""

    video: UInt8[Array, "b f h w 3"]
    image: UInt8[Array, "images 1 h w 3"] | None = None


class Window(NamedTuple):
    """The frames of one example."""

    pixels: UInt8[np.ndarray, "f h w 3"]


@dataclass(frozen=True)
class VAEDataConfig:
    """What a VAE is trained on, and the shape of a batch. Counts are per host.

    Args:
        height, width: of the pixels of every clip and picture.
        frames: of a clip.
        fps: at which they are taken from the file.
        batch: clips.
        images: pictures of a batch: images of the manifest, or single frames of its
            videos if it has no images.
        windows: places where a clip may begin, evenly from a file's first frame to the
            last possible one; chosen at random.
        held_out: records at the manifest's end that are not trained on.
        workers: processes that decode; 0 decodes in this one.
        cache_mib: memory for decoded clips, per worker.
        max_bad: fraction of the files that may be unusable.

    Raises:
        ValueError: a value is out of range.
    """

    manifest: str | Path
    height: int
    width: int
    frames: int
    fps: float
    batch: int
    images: int = 0
    windows: int = 1
    held_out: int = 0
    seed: int = 0
    workers: int = 0
    cache_mib: int = 512
    max_bad: float = 0.01

    def __post_init__(self):
        for name in ("height", "width", "frames", "fps", "batch", "windows"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected over 0")
        for name in ("images", "held_out", "workers", "cache_mib", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}, expected 0 to 1")

    def records(self, part: Part) -> tuple[Record, ...]:
        """The records of one part of the manifest."""
        records = read_manifest(self.manifest)
        first = len(records) - self.held_out
        if first < 1:
            raise ValueError(
                f"held_out {self.held_out} leaves nothing of the {len(records)} "
                f"records of {self.manifest}; hold out fewer, or use more data"
            )
        return records[:first] if part == "training" else records[first:]


@dataclass(frozen=True)
class Crop:
    """Makes an example of a record: `frames` frames from a window drawn at random.

    The number of the example alone decides the window.
    """

    cfg: VAEDataConfig
    frames: int
    shard: tuple[int, int]
    kept: Kept

    def __call__(self, index: int, record: Record) -> Window | Failure:
        host, hosts = self.shard
        number = index * hosts + host
        rng = np.random.default_rng((self.cfg.seed, number))
        window = int(rng.integers(self.cfg.windows))
        try:
            key = (record.path, window)
            return Window(self.kept.get(key, lambda: [self._read(record, window)])[0])
        except (ValueError, OSError) as error:
            return Failure(str(record.path), str(error))

    def _read(self, record: Record, window: int) -> UInt8[np.ndarray, "f h w 3"]:
        size: HeightWidth = (self.cfg.height, self.cfg.width)
        if record.kind == "image":
            return read_image(record.path, size)[None]
        place = window / max(1, self.cfg.windows - 1)
        return read_video(record.path, size, self.frames, self.cfg.fps, place)


def batches(
    cfg: VAEDataConfig,
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    part: Part = "training",
) -> grain.DatasetIterator[Footage]:
    """An endless iterator of `Footage` in numpy; it has get_state, set_state and close.

    Args:
        folder: gets `skipped.jsonl`, a line for each file that could not be used.
        shard: index and count of the hosts; each has examples of its own.

    Raises:
        ValueError: a bad manifest, or one without videos; the iterator raises when more
            files than `max_bad` are unusable.
    """
    records = cfg.records(part)
    videos = tuple(record for record in records if record.kind == "video")
    images = tuple(record for record in records if record.kind == "image")
    if not videos:
        raise ValueError(
            f"{cfg.manifest} has no video among its {len(records)} records for "
            f"{part}; add videos, or change held_out {cfg.held_out}"
        )
    kinds = [(videos, cfg.frames, cfg.batch)]
    if cfg.images:
        kinds.append((images or videos, 1, cfg.images))
    parts = []
    for chosen, frames, count in kinds:
        source = RecordSource(
            chosen, cfg.seed, cfg.workers, cfg.max_bad, shard, Path(folder)
        )
        cut = Crop(cfg, frames, shard, Kept(cfg.cache_mib * 2**20 // len(kinds)))
        parts.append(source.examples(cut).batch(count))
    return ahead(grain.experimental.ZipIterDataset(parts).map(_footage))


def _footage(parts: tuple[dict[str, np.ndarray], ...]) -> Footage:
    return Footage(*(part["pixels"] for part in parts))
