# SPDX-License-Identifier: Apache-2.0
"""Writes a shard of training data, which `pyramid_jax/data/shards.py` reads.

Shard i of n has every n-th record of a manifest from number i on, whichever host writes
it. Its pieces get their names when they are whole: a process that was killed is started
again, keeps them, and makes the others. Nothing is made twice, nothing is lost, and no
process knows of the others.
"""

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import UInt8

from launch.prepare.storage import (
    LatentJob,
    LoadedPixels,
    groups_of_one_shape,
    remember,
)
from pyramid_jax.data.manifest import Record, read_manifest
from pyramid_jax.data.shards import encoded_record, piece_path, shard_name
from pyramid_jax.data.source import BadFiles, Failure
from pyramid_jax.data.stored import EMPTY, read_features

PIECE = 256  # records of a piece


def write_shard(
    manifest: str | Path,
    folder: str | Path,
    job: LatentJob,
    shard: tuple[int, int],
    piece: int = PIECE,
) -> Path:
    """Writes one shard of a manifest; returns the file that says that it is whole.

    Captions have their features with them where the manifest names some. Unusable files
    are left out, and listed in the shard's `skipped.jsonl`.

    Args:
        shard: index and count.
        piece: records of a file; so many are made again after a process was killed.

    Raises:
        ValueError: a bad manifest or shard, shards made with something else, or too
            many unusable files.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index}/{count}: give INDEX/COUNT, e.g. 0/8 to 7/8")
    records, folder = read_manifest(manifest), Path(folder)
    if count > len(records):
        raise ValueError(f"{len(records)} records can't be cut into {count} shards")
    sizes = [list(size) for size in job.sizes]
    made_with = {"files": "shards", "sizes": sizes, "piece": piece, **job.made_with}
    remember(folder, made_with)
    _keep_empty(records, folder)
    numbers = range(index, len(records), count)
    own = folder / shard_name(index, count)
    own.mkdir(exist_ok=True)
    bad_files = BadFiles(own / "skipped.jsonl", job.max_bad, len(numbers))
    counts = []
    for start in range(0, len(numbers), piece):
        path = piece_path(own, start // piece)
        if not path.is_file():
            some = numbers[start : start + piece]
            _write_piece(path, _entries(records, some, job, bad_files))
        counts.append(_size(path))
    done = own.with_name(f"{own.name}.json")
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps({"pieces": counts}) + "\n", encoding="utf-8")
    return partial.replace(done)


def without_cuts(
    pixels: UInt8[np.ndarray, "f h w 3"], most: float
) -> UInt8[np.ndarray, "f h w 3"]:
    """The pixels of a video of a single shot.

    Args:
        most: mean change of pixels, of 255, from one frame to the next, above which it
            is a cut.

    Raises:
        ValueError: the video has a cut.
    """
    small = pixels[:, ::4, ::4].astype(np.float32)
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    if change.size and (largest := change.max()) > most:
        raise ValueError(
            f"has a cut: between its frames {change.argmax()} and "
            f"{change.argmax() + 1} pixels change by {largest:.0f} of 255 on average, "
            f"at most {most:g} may; cut it into shots"
        )
    return pixels


def _entries(
    records: Sequence[Record],
    numbers: Sequence[int],
    job: LatentJob,
    bad_files: BadFiles,
) -> dict[int, bytes]:
    """The usable ones of some records in bytes, by number."""
    entries: dict[int, bytes] = {}

    def make(group: list[LoadedPixels]) -> None:
        for each, latent in zip(group, job.latents(group), strict=True):
            try:
                entries[each.number] = _entry(records[each.number], latent)
            except (ValueError, OSError) as error:
                path = str(records[each.number].path)
                bad_files.report(Failure(path, str(error)))

    for group in groups_of_one_shape(records, numbers, job, bad_files):
        make(group)
    return entries


def _entry(record: Record, latent: np.ndarray) -> bytes:
    if not np.isfinite(latent).all():
        raise ValueError("its latent is not finite in float16")
    arrays: Mapping[str, np.ndarray] = {"latent": latent}
    if record.features is not None:
        arrays = arrays | read_features(record.features)._asdict()
    return encoded_record(record, arrays)


def _write_piece(path: Path, entries: Mapping[int, bytes]) -> None:
    """Writes a file that appears complete or not at all."""
    partial = path.with_suffix(".partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for number in sorted(entries):
        writer.write(entries[number])
    writer.close()
    partial.replace(path)


def _size(path: Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _keep_empty(records: Sequence[Record], folder: Path) -> None:
    """Copies the features of the empty caption, if the captions have features."""
    if (features := records[0].features) is not None:
        partial = folder / f"{EMPTY}.{uuid.uuid4().hex}"  # other hosts write it, too
        shutil.copyfile(features.parent / EMPTY, partial)
        partial.replace(folder / EMPTY)
