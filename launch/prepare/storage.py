# SPDX-License-Identifier: Apache-2.0
"""Writes features of captions and latents of videos, which `data.stored` reads.

Files are named after captions, and after the paths of videos and images.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from safetensors.numpy import save_file

from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.data.pixels import HeightWidth
from pyramid_jax.data.source import (
    BadFiles,
    Failure,
    attempt,
    let_grain_read_flags,
    nearest_size,
)
from pyramid_jax.data.stored import EMPTY, CaptionFeatures
from pyramid_jax.shapes import Text

EncodeText = Callable[[Sequence[str]], Text]  # texts, one per row


# ----------------------------------------------------------------------- captions


def write_features(
    manifest: str | Path, folder: str | Path, encode: EncodeText, batch: int = 16
) -> Path:
    """Stores features of all captions; returns a manifest in `folder` that names them.

    Files that exist are kept, so an interrupted run goes on where it stopped. The
    folder must be new if the encoder is another one.

    Args:
        batch: captions that are encoded at once.

    Raises:
        ValueError: a bad manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = read_manifest(manifest)
    texts = ["", *dict.fromkeys(record.text for record in records)]
    missing = [text for text in texts if not features_path(folder, text).is_file()]
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        # perf: batches of one size, so that the encoder is compiled once.
        filled = some + [""] * (batch - len(some))
        for text, features in zip(some, _unpadded(encode(filled)), strict=False):
            _save(features_path(folder, text), features._asdict())
    named = [replace(r, features=features_path(folder, r.text)) for r in records]
    return write_manifest(folder / "manifest.jsonl", named)


def features_path(folder: Path, text: str) -> Path:
    """The file with the features of a text."""
    return folder / EMPTY if not text else _named_after(folder, text)


def _unpadded(text: Text) -> Iterator[CaptionFeatures]:
    """The features of every row, without its padding."""
    for tokens, segment, pooled in zip(*map(np.asarray, text), strict=True):
        valid = tokens[segment >= 0]
        yield CaptionFeatures(*(x.astype(jnp.bfloat16) for x in (valid, pooled)))


# ------------------------------------------------------------------------ latents


@dataclass(frozen=True)
class LatentJob:
    """How latents are made.

    Args:
        encode: pixels `b f h w 3` and the numbers of their records, which decide the
            noise, to raw latents `b t h w c`.
        load: 8-bit pixels of a record at a size, e.g. by `source.read_pixels`.
        sizes: heights and widths; a file gets the nearest aspect ratio.
        batch: videos of one shape that are encoded together.
        max_bad: fraction of the files that may be unusable.
        workers: threads that decode files.
    """

    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    load: Callable[[Record, HeightWidth], np.ndarray]
    sizes: tuple[HeightWidth, ...]
    batch: int = 1
    max_bad: float = 0.01
    workers: int = 2


class LoadedPixels(NamedTuple):
    """The pixels of a record, and its number in the manifest."""

    number: int
    pixels: UInt8[np.ndarray, "f h w 3"]


def write_latents(manifest: str | Path, folder: str | Path, job: LatentJob) -> Path:
    """Stores the latents of all records; returns a manifest that names them.

    Files that exist are kept, so an interrupted run goes on where it stopped. The
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
    paths = [latent_path(folder, record.path) for record in records]
    first = {path: i for i, path in reversed([*enumerate(paths)])}
    bad_files = BadFiles(folder / "skipped.jsonl", job.max_bad, len(first))
    missing = [i for i in sorted(first.values()) if not paths[i].is_file()]
    waiting: dict[tuple[int, ...], list[LoadedPixels]] = defaultdict(list)
    for loaded in _load_pixels(records, missing, job):
        if isinstance(loaded, Failure):
            bad_files.report(loaded)
            continue
        group = waiting[loaded.pixels.shape]
        group.append(loaded)
        if len(group) == job.batch:
            _store(group, paths, job)
            group.clear()
    for group in filter(None, waiting.values()):
        _store(group, paths, job)
    pairs = zip(records, paths, strict=True)
    named = [replace(record, latent=path) for record, path in pairs if path.is_file()]
    return write_manifest(folder / "manifest.jsonl", named)


def latent_path(folder: Path, path: Path) -> Path:
    """The file with the latent of a video or image."""
    return _named_after(folder, path.as_posix())


def _load_pixels(
    records: Sequence[Record], numbers: Sequence[int], job: LatentJob
) -> Iterator[LoadedPixels | Failure]:
    """The pixels of some records; files are decoded while latents are made."""

    def load(number: int, record: Record) -> LoadedPixels:
        size = nearest_size(job.sizes, record)
        return LoadedPixels(number, job.load(record, size))

    if not numbers:
        return iter(())
    let_grain_read_flags()
    pixels = grain.MapDataset.source(numbers).map(
        lambda number: attempt(load, number, records[number])
    )
    threads = grain.ReadOptions(job.workers, job.batch + job.workers)
    return iter(pixels.to_iter_dataset(threads))


def _store(group: list[LoadedPixels], paths: Sequence[Path], job: LatentJob) -> None:
    # perf: batches of one size, so that every shape is compiled once.
    filled = group + [group[-1]] * (job.batch - len(group))
    pixels = np.stack([each.pixels for each in filled])
    latents = job.encode(pixels, np.array([each.number for each in filled]))
    for each, latent in zip(group, latents, strict=False):
        _save(paths[each.number], {"latent": latent.astype(np.float16)})


# -------------------------------------------------------------------------- files


def _named_after(folder: Path, text: str) -> Path:
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file that appears complete or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, partial)
    partial.replace(path)
