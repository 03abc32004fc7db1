# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that turn captions into token ids and need no download."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from pyramid_jax.config import asset_path

# Prompts are padded to a multiple of it, so that few lengths compile.
MULTIPLE = 16

BYT5 = 3 + 256  # ids: padding, the end, an unknown one, and bytes

Tokenize = Callable[[str], list[int]]  # token ids of a text


def load_tokenizer(name: str | Path, vocabulary: int | None = None) -> Tokenize:
    """The tokenizer in a tokenizer.json, or ByT5's for the name "byt5"; picklable.

    ByT5 has a token for every byte of UTF-8, and one for the end.

    Args:
        vocabulary: token ids that the model reads; None: any.

    Raises:
        ValueError: the name is neither of the two, or it has more ids.
    """
    if str(name) == "byt5":
        from transformers import ByT5Tokenizer  # slow, and complains without PyTorch

        _check_ids(name, BYT5, vocabulary)
        return ByT5Tokenizer().encode
    try:
        tokenizer = Tokenizer.from_file(str(asset_path(name)))
        tokenizer.no_padding()  # padding would be read like words
        tokenizer.no_truncation()
        tokenizer.encode("a")  # raises where its parts don't fit together
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # no narrower class; that of a panic is this one
        raise ValueError(
            f'{name} is no tokenizer.json ({error}); give one, or "byt5"'
        ) from error
    _check_ids(name, 1 + max(tokenizer.get_vocab().values(), default=0), vocabulary)
    return partial(_ids, tokenizer)


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


def _check_ids(name: str | Path, ids: int, vocabulary: int | None) -> None:
    """Checks that the model has a vector for every id: others would be NaN."""
    if vocabulary is not None and ids > vocabulary:
        raise ValueError(
            f"the tokenizer {name} has {ids} token ids, the model reads {vocabulary}; "
            "give the model's own tokenizer, or train one with a larger vocabulary"
        )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids
