# SPDX-License-Identifier: Apache-2.0
"""Clips and pictures in pixels, for the training of a VAE.

The last `held_out` records of a manifest are never trained on; `split="held out"` reads
those instead.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from pyramid_jax.config import check_entries
from pyramid_jax.data import source
from pyramid_jax.data.manifest import Record, Split, read_manifest, split_records
from pyramid_jax.data.source import ArrayCache, SourceConfig
from pyramid_jax.shapes import Array


class Footage(NamedTuple):
    """A batch of 8-bit pixels: clips, and pictures, which are clips of one frame."""

    video: UInt8[Array, "b f h w 3"]
    image: UInt8[Array, "images 1 h w 3"] | None = None


class VAEExample(NamedTuple):
    """The frames of one example."""

    pixels: UInt8[np.ndarray, "f h w 3"]


@dataclass(frozen=True)
class VAEDataConfig(SourceConfig):
    """What a VAE is trained on, and the shape of a batch.

    Args:
        images: pictures of a batch, of all hosts: images of the manifest, or single
            frames of its videos if it has no images.
        windows: places where a clip may begin, evenly from a file's first frame to the
            last possible one; chosen at random.

    Raises:
        ValueError: a value is out of range.
    """

    _: KW_ONLY
    images: int = 0
    windows: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_entries(self, lambda x: x > 0, "over 0", "windows")
        check_entries(self, lambda x: x >= 0, "0 or more", "images")


def make_vae_example(
    cfg: VAEDataConfig, frames: int, cache: ArrayCache, number: int, record: Record
) -> VAEExample:
    """Some frames of a record's file, from a window that the example's number decides.

    Raises:
        ValueError, OSError: the record can't be used.
    """
    rng = np.random.default_rng((cfg.seed, number))
    window = int(rng.integers(cfg.windows))
    place = window / max(1, cfg.windows - 1)
    size = (cfg.height, cfg.width)

    def read() -> list[np.ndarray]:
        return [source.read_pixels(record, size, frames, cfg.fps, place)]

    return VAEExample(*cache.get((record.path, window), read))


def vae_batches(
    cfg: VAEDataConfig,
    folder: str | Path,
    rows: tuple[Sequence[int], Sequence[int]] | None = None,
    split: Split = "training",
) -> grain.DatasetIterator[Footage]:
    """An endless iterator of `Footage` in numpy; it has get_state, set_state and close.

    Args:
        folder: gets `skipped.jsonl`, a line for each file that could not be used.
        rows: the clips and the pictures of the batch that this process makes, by their
            numbers; None: all.

    Raises:
        ValueError: a bad manifest, or one without videos; the iterator raises when more
            files than `max_bad` are unusable.
    """
    records = split_records(read_manifest(cfg.manifest), cfg.held_out, split)
    videos = tuple(record for record in records if record.kind == "video")
    images = tuple(record for record in records if record.kind == "image")
    if not videos:
        raise ValueError(
            f"{cfg.manifest} has no video among its {len(records)} records for "
            f"{split}; add videos, or change held_out {cfg.held_out}"
        )
    clips, pictures = rows or (range(cfg.batch), range(cfg.images))
    kinds = {"video": (videos, cfg.frames, clips, cfg.batch)}
    if cfg.images:
        kinds["image"] = (images or videos, 1, pictures, cfg.images)
    streams = {}
    for kind, (files, frames, own, count) in kinds.items():
        cache = ArrayCache(cfg.cache_mib * 2**20 // len(kinds))
        make = partial(make_vae_example, cfg, frames, cache)
        examples = source.read_examples(make, files, cfg, folder, own, count)
        streams |= {f"{kind} {row}": stream for row, stream in examples.items()}
    return source.in_advance(source.Together(streams).map(_footage))


def _footage(parts: dict[str, dict[str, np.ndarray]]) -> Footage:
    kinds = defaultdict(list)
    for name, part in parts.items():
        kinds[name.split()[0]].append(part["pixels"])
    return Footage(**{kind: np.stack(pixels) for kind, pixels in kinds.items()})
