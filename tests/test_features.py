# SPDX-License-Identifier: Apache-2.0
"""Stored features of captions are what the encoder says, without padding."""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from absl.testing import flagsaver

from launch import prepare
from pyramid_jax import prompts
from pyramid_jax.data.features import feature_path, read_features, write_features
from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.shapes import Text
from tests.released import write_miniflux

CAPTIONS = ["a red circle", "blue", "a red circle", "moves, left"]


class Lengths:
    """An encoder whose features count: a text of k letters has k + 1 tokens."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Text:
        self.asked.append(list(texts))
        size = np.array([len(text) for text in texts])
        count = np.broadcast_to(np.arange(20)[None], (len(texts), 20))
        segment = np.where(count >= 19 - size[:, None], 0, -1)
        tokens = np.stack([count] * 2, axis=-1).astype(np.float32)
        pooled = size[:, None, None].astype(np.float32)
        return Text(tokens, segment, pooled)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    paths = (tmp_path / f"{i}.mp4" for i in range(len(CAPTIONS)))
    records = [Record(p, "video", t) for p, t in zip(paths, CAPTIONS, strict=True)]
    write_manifest(tmp_path / "clips.jsonl", records)
    return tmp_path / "clips.jsonl"


def test_every_record_names_the_features_of_its_caption(manifest: Path, tmp_path: Path):
    before = read_manifest(manifest)
    after = read_manifest(write_features(manifest, tmp_path / "text", Lengths()))
    for old, new, caption in zip(before, after, CAPTIONS, strict=True):
        assert (new.path, new.kind, new.text) == (old.path, old.kind, old.text)
        tokens, pooled = read_features(new.features)
        size = len(caption)
        assert tokens.shape == (size + 1, 2) and pooled.tolist() == [[size]]
        assert tokens[:, 0].tolist() == list(range(19 - size, 20))
        assert tokens.dtype == ml_dtypes.bfloat16


def test_the_empty_caption_is_stored_too(manifest: Path, tmp_path: Path):
    write_features(manifest, tmp_path / "text", Lengths())
    tokens, pooled = read_features(tmp_path / "text" / "empty.safetensors")
    assert tokens.tolist() == [[19, 19]] and pooled.tolist() == [[0]]


def test_every_caption_is_encoded_once_in_batches_of_one_size(
    manifest: Path, tmp_path: Path
):
    encode = Lengths()
    write_features(manifest, tmp_path / "text", encode, batch=3)
    assert encode.asked == [["", "a red circle", "blue"], ["moves, left", "", ""]]


def test_an_interrupted_run_goes_on_where_it_stopped(manifest: Path, tmp_path: Path):
    folder = tmp_path / "text"
    write_features(manifest, folder, Lengths())
    missing = feature_path(folder, "blue")
    whole = missing.read_bytes()
    missing.unlink()
    encode = Lengths()
    write_features(manifest, folder, encode, batch=1)
    assert encode.asked == [["blue"]] and missing.read_bytes() == whole


def test_a_file_of_something_else_is_named(tmp_path: Path):
    (tmp_path / "x.safetensors").write_text("{}")
    for name in ("x", "missing"):
        with pytest.raises(ValueError, match=rf"{name}.* prepare them again"):
            read_features(tmp_path / f"{name}.safetensors")


def test_the_command_stores_what_the_text_encoders_of_a_model_say(
    manifest: Path, tmp_path: Path
):
    model, to = write_miniflux(tmp_path / "model"), tmp_path / "text"
    given = {"text": True, "to": str(to), "model": str(model), "dtype": "float32"}
    with flagsaver.flagsaver(**given, manifest=str(manifest), batch=4):
        prepare.main(["prepare"])
    text = prompts.load(model, "float32")(CAPTIONS)
    for i, record in enumerate(read_manifest(to / "manifest.jsonl")):
        tokens, pooled = read_features(record.features)
        known = np.asarray(text.segment[i]) >= 0
        expected = np.asarray(text.features)[i][known]
        np.testing.assert_allclose(tokens.astype(np.float32), expected, atol=2e-2)
        assert pooled.shape == (1, 8)
    names = json.loads((to / "manifest.jsonl").read_text().splitlines()[0])
    assert names["text_fea"] == feature_path(to, CAPTIONS[0]).name
