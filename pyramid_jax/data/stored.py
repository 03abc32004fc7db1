# SPDX-License-Identifier: Apache-2.0
"""Features of captions and latents of videos, stored by launch.prepare.

A folder of features holds one safetensors file per different caption, and `EMPTY` for
the empty one, which training needs where it drops captions. A folder of latents holds
one safetensors file per video or image, with its raw `latent` in float16: drawn from
the VAE's posterior, not normalised. Either has a manifest.jsonl that names these files,
and `MADE_WITH`, which says what they were made with.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pyramid_jax.data.manifest import Record, read_manifest
from pyramid_jax.data.shards import ShardRecord, Shards, are_shards

EMPTY, MADE_WITH = "empty.safetensors", "made_with.json"


class CaptionFeatures(NamedTuple):
    """What a text encoder makes of one caption, in bfloat16 and without padding."""

    tokens: Float[np.ndarray, "m _"]
    pooled: Float[np.ndarray, "1 _"]


def read_records(path: str | Path) -> Sequence[Record]:
    """The records of a manifest, or of a folder of shards.

    Raises:
        ValueError: as `read_manifest`, or the folder lacks shards.
    """
    return Shards(path) if are_shards(path) else read_manifest(path)


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
    if isinstance(record, ShardRecord):
        return CaptionFeatures(record.arrays["tokens"], record.arrays["pooled"])
    return read_features(record.features)


def check_features(records: Sequence[Record]) -> None:
    """Checks that `stored_features` finds what it needs.

    Raises:
        ValueError: records name no features, or those of the empty caption are missing.
    """
    # Those of shards are alike, and too many to look at each.
    records = records[:1] if isinstance(records, Shards) else records
    without = [record.path for record in records if record.features is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(records)} records name no features of their text, "
            f"the first is {without[0]}; the model has no text encoder of its own, so "
            "make them with pyramid-jax prepare --text"
        )
    for folder in {record.features.parent for record in records if record.features}:
        if not (folder / EMPTY).is_file():
            raise ValueError(
                f"{folder} has no {EMPTY}, the features of the empty caption; make it "
                "with pyramid-jax prepare --text"
            )


@functools.lru_cache(maxsize=8)
def _empty_features(folder: Path) -> CaptionFeatures:
    return read_features(folder / EMPTY)


def read_record_latent(record: Record) -> Float[np.ndarray, "t h w c"]:
    """The raw latent of a record, in float32.

    Raises:
        ValueError: there is none, or its file can't be read.
    """
    if isinstance(record, ShardRecord):
        return record.arrays["latent"].astype(np.float32)
    if record.latent is None:
        raise ValueError(
            "has no latent in the manifest; make latents with "
            "pyramid-jax prepare --latents"
        )
    return read_latent(record.latent)


def read_latent(path: Path) -> Float[np.ndarray, "t h w c"]:
    """The raw latent in a file, in float32.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    (latent,) = _load(path, "latent")
    return latent.astype(np.float32)


def read_made_with(folder: Path) -> dict[str, Any]:
    """What the files of a folder were made with; {} where it does not say."""
    path = folder / MADE_WITH
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); prepare it again") from error


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Words like "fps 8.0, not 24.0" about wanted entries that are made otherwise."""
    pairs = ((name, made.get(name), value) for name, value in wanted.items())
    return ", ".join(f"{n} {a!r}, not {b!r}" for n, a, b in pairs if a != b)


def check_latents(records: Sequence[Record], **wanted: Any) -> None:
    """Checks that stored latents were made with what is wanted, where they say so.

    Raises:
        ValueError: they were made with something else, e.g. at another rate.
    """
    named = () if isinstance(records, Shards) else records
    folders = {record.latent.parent for record in named if record.latent}
    folders |= {records.folder} if isinstance(records, Shards) else set()
    for folder in folders:
        made = read_made_with(folder)
        if made and (wrong := differences(made, wanted)):
            raise ValueError(
                f"the latents in {folder} were made with {wrong}; make those of this "
                "run with pyramid-jax prepare --latents, in a new folder"
            )


def _load(path: Path, *names: str) -> list[np.ndarray]:
    try:
        arrays = load_file(path)
        return [arrays[name] for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"can't read {' and '.join(names)} of {path} ({error}); prepare it again"
        ) from error
