# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that turn captions into token ids and need no download."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

# Prompts are padded to a multiple of it, so that few lengths compile.
MULTIPLE = 16

Tokenize = Callable[[str], list[int]]  # token ids of a text


@dataclass(frozen=True)
class _Ids:
    """Maps a text to its token ids; picklable, for the data workers."""

    tokenizer: Tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


@dataclass(frozen=True)
class _Bytes:
    """Maps a text to the token ids of ByT5: one per byte of UTF-8, and the end."""

    tokenizer: Any  # transformers.ByT5Tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def load_tokenizer(name: str | Path) -> Tokenize:
    """The tokenizer in a tokenizer.json, or ByT5's bytes for the name "byt5".

    Raises:
        ValueError: the name is neither of the two.
    """
    if str(name) == "byt5":
        from transformers import ByT5Tokenizer  # slow, and complains without PyTorch

        return _Bytes(ByT5Tokenizer())
    if not Path(name).is_file():
        raise ValueError(
            f'tokenizer {name} is not a file; give a tokenizer.json or "byt5"'
        )
    try:
        return _Ids(Tokenizer.from_file(str(name)))
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{name} is no tokenizer.json ({error})") from error


def text_batch(
    tokenize: Tokenize, texts: Sequence[str]
) -> tuple[Int[np.ndarray, "b m"], Int[np.ndarray, "b m"]]:
    """Token ids, one text per row, padded on the left, and their segments (0 or -1)."""
    tokens = [tokenize(text) for text in texts]
    length = -(-max(map(len, tokens)) // MULTIPLE) * MULTIPLE
    ids = np.zeros((len(texts), length), np.int32)
    segment = np.full((len(texts), length), -1, np.int32)
    for row, row_segment, text in zip(ids, segment, tokens, strict=True):
        row[length - len(text) :] = text
        row_segment[length - len(text) :] = 0
    return ids, segment
