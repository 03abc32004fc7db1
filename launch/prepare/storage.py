# SPDX-License-Identifier: Apache-2.0
"""Writes features of captions and latents of videos, which `data.stored` reads.

Files are named after captions, and after the whole paths of videos and images. A folder
remembers what its files were made with, and a latent the size and the time of its
video: what contradicts is refused, and what is stale is made again.
"""

import hashlib
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from safetensors import safe_open
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
from pyramid_jax.data.stored import (
    EMPTY,
    MADE_WITH,
    CaptionFeatures,
    differences,
    read_made_with,
)
from pyramid_jax.shapes import Text

EncodeText = Callable[[Sequence[str]], Text]  # texts, one per row


# ----------------------------------------------------------------------- captions


def write_features(
    manifest: str | Path,
    folder: str | Path,
    encode: EncodeText,
    batch: int = 16,
    made_with: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Stores features of all captions; returns a manifest in `folder` that names them.

    Files that exist are kept, so an interrupted run goes on where it stopped.

    Args:
        batch: captions that are encoded at once.
        made_with: JSON values that say which encoder it is.

    Raises:
        ValueError: a bad manifest, or a folder of features made with something else.
    """
    folder = Path(folder)
    records = read_manifest(manifest)
    remember(folder, {"files": "features", **made_with})
    texts = ["", *dict.fromkeys(record.text for record in records)]
    missing = [text for text in texts if not features_path(folder, text).is_file()]
    for start in range(0, len(missing), batch):
        some = missing[start : start + batch]
        # perf: batches of one size, so that the encoder is compiled once.
        filled = some + [""] * (batch - len(some))
        for text, features in zip(some, _unpadded(encode(filled)), strict=False):
            save_arrays(features_path(folder, text), features._asdict())
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
        made_with: JSON values that say which VAE it is, and how files are read.
        batch: videos of one shape that are encoded together.
        max_bad: fraction of the files that may be unusable.
        workers: threads that decode files.
    """

    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    load: Callable[[Record, HeightWidth], np.ndarray]
    sizes: tuple[HeightWidth, ...]
    made_with: Mapping[str, Any]
    batch: int = 1
    max_bad: float = 0.01
    workers: int = 2

    def latents(self, group: "Sequence[LoadedPixels]") -> np.ndarray:
        """The latents of a batch, or a part of one, in float16."""
        # perf: batches of one size, so that every shape is compiled once.
        filled = [*group, *[group[-1]] * (self.batch - len(group))]
        pixels = np.stack([each.pixels for each in filled])
        latents = self.encode(pixels, np.array([each.number for each in filled]))
        with np.errstate(over="ignore"):  # whoever stores them looks for it
            return latents.astype(np.float16)[: len(group)]


class LoadedPixels(NamedTuple):
    """The pixels of a record, and its number in the manifest."""

    number: int
    pixels: UInt8[np.ndarray, "f h w 3"]


def write_latents(manifest: str | Path, folder: str | Path, job: LatentJob) -> Path:
    """Stores the latents of all records; returns a manifest that names them.

    Latents of files that have not changed are kept, so an interrupted run goes on where
    it stopped. Unusable files, also those whose latents are not finite, are left out
    and listed in `skipped.jsonl`.

    Raises:
        ValueError: a bad manifest, one in `folder`, latents there that were made with
            something else, or too many unusable files.
    """
    folder = Path(folder)
    if folder.resolve() == Path(manifest).resolve().parent:
        raise ValueError(
            f"{folder} holds the manifest itself; give another folder for the latents"
        )
    records = read_manifest(manifest)
    sizes = [list(size) for size in job.sizes]
    remember(folder, {"files": "latents", "sizes": sizes, **job.made_with})
    paths = [latent_path(folder, record.path) for record in records]
    first = {path: i for i, path in reversed([*enumerate(paths)])}
    bad_files = BadFiles(folder / "skipped.jsonl", job.max_bad, len(first))
    missing = [i for i in sorted(first.values()) if _is_stale(paths[i], records[i])]
    for number in missing:
        paths[number].unlink(missing_ok=True)

    def store(group: list[LoadedPixels]) -> None:
        for each, latent in zip(group, job.latents(group), strict=True):
            record = records[each.number]
            if not np.isfinite(latent).all():
                reason = "its latent is not finite in float16"
                bad_files.report(Failure(str(record.path), reason))
                continue
            save_arrays(paths[each.number], {"latent": latent}, _source(record))

    for group in groups_of_one_shape(records, missing, job, bad_files):
        store(group)
    pairs = zip(records, paths, strict=True)
    named = [replace(record, latent=path) for record, path in pairs if path.is_file()]
    return write_manifest(folder / "manifest.jsonl", named)


def latent_path(folder: Path, path: Path) -> Path:
    """The file with the latent of a video or image."""
    return _named_after(folder, path.resolve().as_posix())


def groups_of_one_shape(
    records: Sequence[Record], numbers: Sequence[int], job: LatentJob, bad: BadFiles
) -> Iterator[list[LoadedPixels]]:
    """The pixels of some records, so many at once as a batch has; bad files are told.

    The last group of a shape may be smaller.
    """
    waiting: dict[tuple[int, ...], list[LoadedPixels]] = defaultdict(list)
    for loaded in load_pixels(records, numbers, job):
        if isinstance(loaded, Failure):
            bad.report(loaded)
            continue
        group = waiting[loaded.pixels.shape]
        group.append(loaded)
        if len(group) == job.batch:
            yield waiting.pop(loaded.pixels.shape)
    yield from waiting.values()


def load_pixels(
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


def _source(record: Record) -> dict[str, str]:
    """What a latent remembers of its video or image."""
    about = record.path.stat()
    return {"size": str(about.st_size), "modified_ns": str(about.st_mtime_ns)}


def _is_stale(path: Path, record: Record) -> bool:
    """Whether there is no latent, or that of a file that was another one."""
    if not path.is_file():
        return True
    if not record.path.is_file():  # the latent is all that is left
        return False
    with safe_open(path, "numpy") as file:
        return file.metadata() != _source(record)


# -------------------------------------------------------------------------- files


def _named_after(folder: Path, text: str) -> Path:
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def save_arrays(
    path: Path, arrays: dict[str, np.ndarray], about: dict[str, str] | None = None
) -> None:
    """Writes a file that appears complete or not at all."""
    partial = path.with_suffix(".partial")
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(whole, partial, about)
    partial.replace(path)


def remember(folder: Path, made_with: dict[str, Any]) -> None:
    """Writes into a folder what its files are made with.

    Raises:
        ValueError: it has files that were made with something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = read_made_with(folder)
    if not made and any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has files, but no {MADE_WITH} that says what made them; write "
            "to a new folder"
        )
    if made and (wrong := differences(made, made_with)):
        raise ValueError(
            f"{folder} has files that were made with {wrong}; write to a new folder, "
            "or ask for what was made before"
        )
    text = json.dumps(made_with, indent=1) + "\n"
    partial = folder / f"{MADE_WITH}.{uuid.uuid4().hex}"  # other hosts write it, too
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / MADE_WITH)
