# SPDX-License-Identifier: Apache-2.0
"""Features of captions and latents of videos, stored by launch.prepare.

A folder of features holds one safetensors file per different caption, and `EMPTY` for
the empty one, which training needs where it drops captions. A folder of latents holds
one safetensors file per video or image, with its raw `latent` in float16: drawn from
the VAE's posterior, not normalised. Either has a manifest.jsonl that names these files.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pyramid_jax.data.manifest import Record

EMPTY = "empty.safetensors"


class CaptionFeatures(NamedTuple):
    """What a text encoder makes of one caption, in bfloat16 and without padding."""

    tokens: Float[np.ndarray, "m _"]
    pooled: Float[np.ndarray, "1 _"]


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


def read_latent(path: Path) -> Float[np.ndarray, "t h w c"]:
    """The raw latent in a file, in float32.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    (latent,) = _load(path, "latent")
    return latent.astype(np.float32)


def _load(path: Path, *names: str) -> list[np.ndarray]:
    try:
        arrays = load_file(path)
        return [arrays[name] for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"can't read {' and '.join(names)} of {path} ({error}); prepare it again"
        ) from error
