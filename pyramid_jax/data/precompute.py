# SPDX-License-Identifier: Apache-2.0
"""Features of captions and latents of videos, stored once and read while training.

A folder of features holds one safetensors file per different caption, named after it,
and `empty.safetensors` for the empty one, which training needs where it drops captions.
A folder of latents holds one safetensors file per video or image, named after its path,
with its raw `latent` in float16: drawn from the VAE's posterior, not normalised. Either
has a manifest.jsonl, the given one with the names of these files.
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.data.pixels import HeightWidth
from pyramid_jax.data.source import (
    BadFiles,
    Failure,
    attempt,
    let_grain_read_flags,
    nearest_size,
)
from pyramid_jax.shapes import Text

EMPTY = "empty.safetensors"

EncodeText = Callable[[Sequence[str]], Text]  # texts, one per row


# ----------------------------------------------------------------------- captions


class CaptionFeatures(NamedTuple):
    """What a text encoder makes of one caption, in bfloat16 and without padding."""

    tokens: Float[np.ndarray, "m _"]
    pooled: Float[np.ndarray, "1 _"]


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


def read_features(path: Path) -> CaptionFeatures:
    """The features in a file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    return CaptionFeatures(*_load(path, *CaptionFeatures._fields))


def stored_features(record: Record, dropped: bool) -> CaptionFeatures:
    """The stored features of a record's caption, or of the empty one."""
    assert record.features is not None  # as `check_features` says
    if dropped:
        return _empty_features(record.features.parent)
    return read_features(record.features)


def check_features(records: Sequence[Record]) -> None:
    """Checks that `stored_features` finds what it needs.

    Raises:
        ValueError: records name no features, or those of the empty caption are missing.
    """
    without = [record.path for record in records if record.features is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(records)} records name no features of their text, "
            f"the first is {without[0]}; the model has no text encoder of its own, so "
            "make them with launch.prepare --text"
        )
    for folder in {record.features.parent for record in records if record.features}:
        if not (folder / EMPTY).is_file():
            raise ValueError(
                f"{folder} has no {EMPTY}, the features of the empty caption; make it "
                "with launch.prepare --text"
            )


@functools.lru_cache(maxsize=8)
def _empty_features(folder: Path) -> CaptionFeatures:
    return read_features(folder / EMPTY)


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


def read_latent(path: Path) -> Float[np.ndarray, "t h w c"]:
    """The raw latent in a file, in float32.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    (latent,) = _load(path, "latent")
    return latent.astype(np.float32)


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


def _load(path: Path, *names: str) -> list[np.ndarray]:
    try:
        arrays = load_file(path)
        return [arrays[name] for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"can't read {' and '.join(names)} of {path} ({error}); prepare it again"
        ) from error
