# SPDX-License-Identifier: Apache-2.0
"""Tokenizers are read from files, and travel to the workers."""

import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.pipeline.folder import TINY


def test_byt5_has_a_token_per_byte_and_an_end():
    assert load_tokenizer("byt5")("hé") == [ord("h") + 3, 0xC3 + 3, 0xA9 + 3, 1]


def test_a_tokenizer_travels_to_workers():
    for name in (TINY / "tokenizer.json", "byt5"):
        tokenize = load_tokenizer(name)
        assert pickle.loads(pickle.dumps(tokenize))("red") == tokenize("red")


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path: Path):
    file = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text = "a red circle moves left"
    plain = file.encode(text).ids
    file.enable_padding(length=16)
    file.enable_truncation(3)
    file.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json")(text) == plain


@pytest.mark.parametrize("name", [TINY / "tokenizer.json", "byt5"])
def test_more_ids_than_a_model_reads_are_refused(name):
    load_tokenizer(name, 384)
    with pytest.raises(ValueError, match=r"token ids, the model reads 100; give"):
        load_tokenizer(name, 100)


def test_a_missing_or_broken_file_is_named(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"no_such.json is no token.*No such file.*give one"
    ):
        load_tokenizer(tmp_path / "no_such.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no tokenizer.json"):
        load_tokenizer(broken)
