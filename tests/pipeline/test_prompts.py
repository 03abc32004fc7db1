# SPDX-License-Identifier: Apache-2.0
"""Prompts: tokens as transformers makes them, rows as the network wants them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.prompts import LIMIT, PromptEncoder, load_prompt_encoder
from pyramid_jax.shapes import Text
from tests.released import write_miniflux, write_mmdit

TEXTS = ["a red circle moves left", "", "blue, circle"]
LONG = "a red circle " * 50 + "moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmdit(tmp_path_factory.mktemp("mmdit"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return load_prompt_encoder(folder, dtype="float32")


@pytest.fixture(scope="module")
def text(encoder: PromptEncoder) -> Text:
    return encoder(TEXTS)


def damaged(folder: Path, to: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(folder, to / "copy"))


def assert_close(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_text_has_a_row_and_the_vectors_of_all_clips(text: Text):
    assert text.features.shape == (3, 128, 16)
    assert text.pooled.shape == (3, 1, 6 + 10)


def test_a_model_with_one_clip_pools_its_state(tmp_path: Path):
    encoder = load_prompt_encoder(write_miniflux(tmp_path), dtype="float32")
    assert len(encoder.networks) == 2 and encoder(["a"]).pooled.shape == (1, 1, 8)


def test_words_stand_at_the_end_of_their_rows(encoder: PromptEncoder):
    ids = encoder.ids(TEXTS)
    for row, segment, text in zip(ids.words, ids.segment, TEXTS, strict=True):
        tokens = encoder.tokenizers[0](text).ids
        assert row[-len(tokens) :].tolist() == tokens
        assert segment.tolist() == [-1] * (LIMIT - len(tokens)) + [0] * len(tokens)


def test_the_empty_prompt_is_the_end_alone(encoder: PromptEncoder, text: Text):
    assert encoder.tokenizers[0]("").ids == [1]
    assert np.flatnonzero(np.asarray(text.segment[1]) >= 0).tolist() == [LIMIT - 1]


def test_clips_read_start_words_and_end_and_ends_again(encoder: PromptEncoder):
    (row, *_), _ = encoder.ids(TEXTS).clips
    start, end = row[0], row[-1]
    tokens = encoder.tokenizers[1](TEXTS[0]).ids
    assert (start, end) == (tokens[0], tokens[-1]) and end == row.max()
    assert row.tolist() == tokens + [end] * (77 - len(tokens))


def test_a_prompt_is_encoded_alike_alone_and_among_others(
    encoder: PromptEncoder, text: Text
):
    alone = encoder(TEXTS[2:])
    words = np.asarray(alone.segment[0]) >= 0
    assert_close(text.features[2][words], alone.features[0][words])
    assert_close(text.pooled[2], alone.pooled[0])
    assert np.abs(text.pooled[2] - text.pooled[0]).max() > 1e-3


@pytest.mark.parametrize("place", range(3))
def test_long_texts_are_cut_as_transformers_cuts_them(
    encoder: PromptEncoder, place: int
):
    tokenizer = encoder.tokenizers[place]
    theirs = tokenizer.tokenizer(LONG, truncation=True, max_length=tokenizer.limit)
    assert tokenizer(LONG).ids == theirs["input_ids"]
    assert len(tokenizer(LONG).ids) == tokenizer.limit == (128, 77, 77)[place]


def test_a_warning_shows_the_words_that_are_not_read(
    encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
):
    ids, lost = encoder.tokenizers[0](LONG)
    assert LONG.endswith(lost) and lost.endswith("red circle moves left")
    read = LONG.removesuffix(lost)
    assert encoder.tokenizers[0](read).ids[:-1] == ids[:-1]
    encoder.ids(["a", LONG])
    (said,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert said.getMessage() == (
        f"128 tokens of a prompt are read, this part is not: {lost!r}"
    )


def test_texts_within_the_limit_lose_nothing(
    encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
):
    within = "red " * (LIMIT - 1)
    assert encoder.tokenizers[0](within).lost == ""
    encoder.ids([within.strip(), *TEXTS])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_prompts_are_finished_as_the_released_models_expect():
    assert prompts.finished(["a cat", ""]) == [
        "a cat, hyper quality, Ultra HD, 8K",
        ", hyper quality, Ultra HD, 8K",
    ]
    assert prompts.NEGATIVE.startswith("cartoon style, worst quality, low quality")
    assert prompts.NEGATIVE.endswith("mutated anatomy, monochrome, horror")


def test_weights_are_stored_in_the_precision_that_is_asked_for(
    folder: Path, text: Text
):
    encoder = load_prompt_encoder(folder)
    leaves = jax.tree.leaves([network.params for network in encoder.networks])
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    half = encoder(TEXTS)
    assert half.features.dtype == half.pooled.dtype == np.float32
    assert 0 < np.abs(half.pooled - text.pooled).max() < 0.1


def test_devices_share_the_weights_and_agree_with_one(folder: Path, text: Text):
    mesh = sharding.device_mesh(data=1, fsdp=2, tensor=4)
    encoder = load_prompt_encoder(folder, dtype="float32", mesh=mesh)
    qkv = encoder.networks[0].params["blocks"]["qkv"]["kernel"]
    assert qkv.shape == (2, 16, 3, 4, 4)  # layers, width, three, heads, dim
    assert qkv.addressable_shards[0].data.shape == (2, 8, 3, 1, 4)
    shared = encoder(TEXTS)
    assert_close(shared.features, text.features)
    assert_close(shared.pooled, text.pooled)


def test_no_text_at_all_is_an_error(encoder: PromptEncoder):
    with pytest.raises(ValueError, match="no text to encode"):
        encoder([])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer_3/tokenizer.json", r"tokenizer_3 lacks tokenizer\.json"),
        ("tokenizer/merges.txt", r"tokenizer lacks merges\.txt"),
        ("text_encoder_2/config.json", r"text_encoder_2 has no config\.json"),
        ("text_encoder_2/model.safetensors", r"text_encoder_2 has no \.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, lost: str, message: str):
    copy = damaged(folder, tmp_path)
    (copy / lost).unlink()
    with pytest.raises(ValueError, match=message):
        load_prompt_encoder(copy)


@pytest.mark.parametrize(
    ("ends", "message"),
    [((), "0 T5 and 0 CLIP"), (("_3",), "1 T5 and 0"), (("", "_2"), "0 T5 and 2")],
)
def test_a_folder_needs_one_t5_and_a_clip(folder, tmp_path, ends, message):
    for end in ends:
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(folder / f"{name}{end}", tmp_path / f"{name}{end}")
    with pytest.raises(ValueError, match=message):
        load_prompt_encoder(tmp_path)


def test_an_encoder_of_another_kind_is_refused(folder: Path, tmp_path: Path):
    copy = damaged(folder, tmp_path)
    (copy / "text_encoder" / "config.json").write_text(json.dumps({"dim": 3}))
    with pytest.raises(ValueError, match="neither a T5 nor a CLIP"):
        load_prompt_encoder(copy)
