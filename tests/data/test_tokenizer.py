# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: real ones, for any text, that workers can take along."""

import pickle
from pathlib import Path

import pytest

from pyramid_jax.data.moving_shapes import captions
from pyramid_jax.data.tokenizer import load_tokenizer, train_tokenizer
from pyramid_jax.pipeline.folder import TINY


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [caption.text for caption in captions()]
    return train_tokenizer(texts, 384, tmp_path_factory.mktemp("t") / "tokenizer.json")


def test_words_of_the_captions_are_one_token_each(path: Path):
    ids = load_tokenizer(path)("a red circle moves left")
    assert len(ids) == 5 + 1 and len(set(ids)) == 6


def test_any_text_has_tokens_below_the_vocabulary(path: Path):
    ids = load_tokenizer(path)("Ein purpurner Tintenfisch, 東京 \N{SQUID}!")
    assert len(ids) > 10 and all(0 <= i < 384 for i in ids)


def test_the_empty_text_is_the_end_alone(path: Path):
    tokenize = load_tokenizer(path)
    assert tokenize("") == tokenize("a red circle moves left")[-1:]


def test_training_is_reproducible_and_made_the_committed_file(path: Path):
    assert path.read_text() == (TINY / "tokenizer.json").read_text()


def test_byt5_has_a_token_per_byte_and_an_end():
    assert load_tokenizer("byt5")("hé") == [ord("h") + 3, 0xC3 + 3, 0xA9 + 3, 1]


def test_a_tokenizer_travels_to_workers(path: Path):
    for name in (path, "byt5"):
        tokenize = load_tokenizer(name)
        assert pickle.loads(pickle.dumps(tokenize))("red") == tokenize("red")


def test_a_vocabulary_must_hold_all_bytes(tmp_path: Path):
    with pytest.raises(ValueError, match="vocabulary 100 must hold 256 bytes"):
        train_tokenizer(["a"], 100, tmp_path / "t.json")


def test_a_missing_or_broken_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no_such.json is not a file; give a token"):
        load_tokenizer(tmp_path / "no_such.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is no tokenizer.json"):
        load_tokenizer(broken)
