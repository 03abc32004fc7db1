# SPDX-License-Identifier: Apache-2.0
"""Latents of videos and images, stored once and read while training.

A folder holds one safetensors file per video or image, with its raw `latent` in
float16: drawn from the VAE's posterior, not normalised. Its manifest.jsonl is the given
one with the names of these files. The name of a file is made from that of its video.
"""

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pyramid_jax.data.examples import Failure, HeightWidth, Load, nearest
from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.data.packing import Sound

# Pixels `b f h w 3` and the numbers of their records, which decide the noise, to raw
# latents `b t h w c`.
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LatentJob:
    """How latents are made.

    Args:
        encode: raw latents of a batch.
        load: 8-bit pixels of a record at a size, e.g. `records.Pixels`.
        sizes: heights and widths; a file gets the nearest aspect ratio.
        batch: videos of one shape that are encoded together.
        max_bad: fraction of the files that may be unusable.
        workers: threads that decode files.
    """

    encode: Encode
    load: Load
    sizes: tuple[HeightWidth, ...]
    batch: int = 1
    max_bad: float = 0.01
    workers: int = 2


class Loaded(NamedTuple):
    """The pixels of a record, and its number in the manifest."""

    number: int
    pixels: UInt8[np.ndarray, "f h w 3"]


def write_latents(manifest: str | Path, folder: str | Path, job: LatentJob) -> Path:
    """Stores the latents of all records; returns a manifest that names them.

    What is there already is kept, so an interrupted run goes on where it stopped. The
    folder must be new if the VAE, the sizes or the frames are others. Unusable files
    are left out and listed in `skipped.jsonl`.

    Raises:
        ValueError: a bad manifest, one in `folder`, or too many unusable files.
    """
    folder = Path(folder)
    if folder.resolve() == Path(manifest).resolve().parent:
        raise ValueError(
            f"{folder} holds the manifest itself; give another folder for the latents"
        )
    folder.mkdir(parents=True, exist_ok=True)
    records = read_manifest(manifest)
    first = {latent_path(folder, r.path): i for i, r in reversed([*enumerate(records)])}
    left = sorted(i for path, i in first.items() if not path.is_file())
    waiting: dict[tuple[int, ...], list[Loaded]] = defaultdict(list)
    sound = Sound(folder / "skipped.jsonl", job.max_bad, len(first))
    for found in _loaded(records, left, job):
        if isinstance(found, Failure):
            sound.flat_map([found])
            continue
        group = waiting[found.pixels.shape]
        group.append(found)
        if len(group) == job.batch:
            _store(group, records, folder, job)
            group.clear()
    for group in waiting.values():
        if group:
            _store(group, records, folder, job)
    named = [
        dataclasses.replace(record, latent=latent_path(folder, record.path))
        for record in records
    ]
    kept = [record for record in named if record.latent and record.latent.is_file()]
    write_manifest(folder / "manifest.jsonl", kept)
    return folder / "manifest.jsonl"


def latent_path(folder: Path, path: Path) -> Path:
    """The file with the latent of a video or image."""
    name = hashlib.sha256(path.as_posix().encode()).hexdigest()[:24]
    return folder / f"{name}.safetensors"


def read_latent(path: Path) -> Float[np.ndarray, "t h w c"]:
    """The raw latent in a file, in float32.

    Raises:
        ValueError: the file is missing or no such file.
    """
    try:
        return load_file(path)["latent"].astype(np.float32)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} can't be read as a latent ({error}); prepare it again"
        ) from error


def _loaded(
    records: Sequence[Record], numbers: Sequence[int], job: LatentJob
) -> Iterator[Loaded | Failure]:
    """The pixels of some records; files are decoded while latents are made."""

    def one(number: int) -> Loaded | Failure:
        record = records[number]
        try:
            return Loaded(number, job.load(record, nearest(job.sizes, record.path)))
        except (ValueError, OSError) as error:
            return Failure(str(record.path), str(error))

    ahead = job.batch + job.workers
    with ThreadPoolExecutor(job.workers) as pool:
        started = [pool.submit(one, number) for number in numbers[:ahead]]
        for number in [*numbers[ahead:], *[None] * len(started)]:
            yield started.pop(0).result()
            if number is not None:
                started.append(pool.submit(one, number))


def _store(
    group: list[Loaded], records: Sequence[Record], folder: Path, job: LatentJob
) -> None:
    # perf: batches of one size, so that every shape is compiled once.
    filled = group + [group[-1]] * (job.batch - len(group))
    pixels = np.stack([each.pixels for each in filled])
    latents = job.encode(pixels, np.array([each.number for each in filled]))
    for each, latent in zip(group, latents, strict=False):
        path = latent_path(folder, records[each.number].path)
        partial = path.with_suffix(".partial")
        half = np.ascontiguousarray(latent, dtype=np.float16)
        save_file({"latent": half}, partial)
        os.replace(partial, path)  # complete or not at all
