# SPDX-License-Identifier: Apache-2.0
"""Captions as token ids, or as features that a text encoder made of them once.

A folder of features holds one safetensors file per different caption, named after it,
and `empty.safetensors` for the empty one, which training needs where it drops captions.
A file has `tokens`, the features of the caption's tokens, without padding, and
`pooled`, its pooled vector, both in bfloat16.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.shapes import Text

EMPTY = "empty.safetensors"

Encode = Callable[[Sequence[str]], Text]  # texts, one per row
Tokenize = Callable[[str], list[int]]


class Caption(NamedTuple):
    """One caption: ids or features of its tokens, and its pooled vector.

    The vector of a caption of ids is empty: the model that reads them makes its own.
    """

    tokens: Int[np.ndarray, "m"] | Float[np.ndarray, "m _"]
    pooled: Float[np.ndarray, "1 _"]


# of a record; True: the empty one instead
Captions = Callable[[Record, bool], Caption]


@dataclass(frozen=True)
class Tokenised:
    """Captions as token ids."""

    tokenize: Tokenize

    def __call__(self, record: Record, dropped: bool) -> Caption:
        """The caption of a record, or the empty one."""
        ids = np.array(self.tokenize("" if dropped else record.text), np.int32)
        return Caption(ids, np.zeros((1, 0), np.float32))


def stored(record: Record, dropped: bool) -> Caption:
    """The stored features of a record's caption, or of the empty one."""
    if record.features is None:
        raise ValueError(f"{record.path} names no features of its text")
    return _empty(record.features.parent) if dropped else read(record.features)


def check_stored(records: Sequence[Record]) -> None:
    """Whether `stored` has what it needs.

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


def write(
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
    left = [text for text in texts if not file_of(folder, text).is_file()]
    for start in range(0, len(left), batch):
        some = left[start : start + batch]
        # perf: batches of one size, so that the encoder is compiled once.
        filled = some + [""] * (batch - len(some))
        for text, caption in zip(some, _rows(encode(filled)), strict=False):
            _write(file_of(folder, text), caption)
    named = [dataclasses.replace(r, features=file_of(folder, r.text)) for r in records]
    write_manifest(folder / "manifest.jsonl", named)
    return folder / "manifest.jsonl"


def file_of(folder: Path, text: str) -> Path:
    """The file with the features of a text."""
    if not text:
        return folder / EMPTY
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def read(path: Path) -> Caption:
    """The features in a file.

    Raises:
        ValueError: the file is missing or no such file.
    """
    try:
        return Caption(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(
            f"{path} can't be read as text features ({error}); prepare them again"
        ) from error


@functools.lru_cache(maxsize=8)
def _empty(folder: Path) -> Caption:
    return read(folder / EMPTY)


def _rows(text: Text) -> Iterator[Caption]:
    """The features of every row, without its padding."""
    for tokens, segment, pooled in zip(*map(np.asarray, text), strict=True):
        valid = tokens[segment >= 0]
        yield Caption(*(x.astype(jnp.bfloat16) for x in (valid, pooled)))


def _write(path: Path, caption: Caption) -> None:
    """The file appears complete or not at all."""
    partial = path.with_suffix(".partial")
    arrays = {name: np.ascontiguousarray(x) for name, x in caption._asdict().items()}
    save_file(arrays, partial)
    os.replace(partial, path)
