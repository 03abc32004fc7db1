# SPDX-License-Identifier: Apache-2.0
"""Captions as features of a text encoder, stored once and read while training.

A folder holds one safetensors file per different caption and `empty.safetensors` for
the empty one, which training needs where it drops captions. A file has `tokens`, the
features of the caption's tokens, without padding, and `pooled`, its pooled vector, both
in bfloat16. The name of a file is made from its caption.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pyramid_jax.data.manifest import read_manifest, write_manifest
from pyramid_jax.shapes import Text

EMPTY = "empty.safetensors"

Encode = Callable[[Sequence[str]], Text]  # texts, one per row


class Features(NamedTuple):
    """What a text encoder says of one caption."""

    tokens: Float[np.ndarray, "m text"]
    pooled: Float[np.ndarray, "1 pooled"]


def write_features(
    manifest: str | Path, folder: str | Path, encode: Encode, batch: int = 16
) -> Path:
    """Stores features of all captions; returns a manifest in `folder` that names them.

    What is there already is kept, so an interrupted run goes on where it stopped. The
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
    left = [text for text in texts if not feature_path(folder, text).is_file()]
    for start in range(0, len(left), batch):
        some = left[start : start + batch]
        # perf: batches of one size, so that the encoder is compiled once.
        filled = some + [""] * (batch - len(some))
        for text, features in zip(some, _rows(encode(filled)), strict=False):
            _write(feature_path(folder, text), features)
    named = [
        dataclasses.replace(r, features=feature_path(folder, r.text)) for r in records
    ]
    write_manifest(folder / "manifest.jsonl", named)
    return folder / "manifest.jsonl"


def feature_path(folder: Path, text: str) -> Path:
    """The file with the features of a text."""
    if not text:
        return folder / EMPTY
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def read_features(path: Path) -> Features:
    """The features in a file.

    Raises:
        ValueError: the file is missing or no such file.
    """
    try:
        return Features(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(
            f"{path} can't be read as text features ({error}); prepare them again"
        ) from error


def _rows(text: Text) -> Iterator[Features]:
    """The features of every row, without its padding."""
    columns = (text.features, text.segment, text.pooled)
    for tokens, segment, pooled in zip(*map(np.asarray, columns), strict=True):
        valid = tokens[segment >= 0]
        yield Features(*(x.astype(ml_dtypes.bfloat16) for x in (valid, pooled)))


def _write(path: Path, features: Features) -> None:
    """The file appears complete or not at all."""
    partial = path.with_suffix(".partial")
    arrays = {name: np.ascontiguousarray(x) for name, x in features._asdict().items()}
    save_file(arrays, partial)
    os.replace(partial, path)
