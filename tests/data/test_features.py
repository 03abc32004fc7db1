# SPDX-License-Identifier: Apache-2.0
"""Stored features of captions are what the encoder says, and what training reads."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch.prepare import __main__ as prepare
from launch.prepare import storage
from pyramid_jax import sharding
from pyramid_jax.data import stored
from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.model import initialise, model_config, training_loss
from pyramid_jax.pipeline import prompts
from pyramid_jax.shapes import Rows, Text
from pyramid_jax.sharding import unbox
from tests.packed import LAYOUT, config, opened, take
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
    after = read_manifest(
        storage.write_features(manifest, tmp_path / "text", Lengths())
    )
    for old, new, caption in zip(before, after, CAPTIONS, strict=True):
        assert (new.path, new.kind, new.text) == (old.path, old.kind, old.text)
        tokens, pooled = stored.read_features(new.features)
        size = len(caption)
        assert tokens.shape == (size + 1, 2) and pooled.tolist() == [[size]]
        assert tokens[:, 0].tolist() == list(range(19 - size, 20))
        assert tokens.dtype == jnp.bfloat16


def test_the_empty_caption_is_stored_too(manifest: Path, tmp_path: Path):
    storage.write_features(manifest, tmp_path / "text", Lengths())
    tokens, pooled = stored.read_features(tmp_path / "text" / "empty.safetensors")
    assert tokens.tolist() == [[19, 19]] and pooled.tolist() == [[0]]


def test_every_caption_is_encoded_once_in_batches_of_one_size(
    manifest: Path, tmp_path: Path
):
    encode = Lengths()
    storage.write_features(manifest, tmp_path / "text", encode, batch=3)
    assert encode.asked == [["", "a red circle", "blue"], ["moves, left", "", ""]]


def test_an_interrupted_run_goes_on_where_it_stopped(manifest: Path, tmp_path: Path):
    folder = tmp_path / "text"
    storage.write_features(manifest, folder, Lengths())
    missing = storage.features_path(folder, "blue")
    whole = missing.read_bytes()
    missing.unlink()
    encode = Lengths()
    storage.write_features(manifest, folder, encode, batch=1)
    assert encode.asked == [["blue"]] and missing.read_bytes() == whole


def test_a_file_of_something_else_is_named(tmp_path: Path):
    (tmp_path / "x.safetensors").write_text("{}")
    for name in ("x", "missing"):
        with pytest.raises(ValueError, match=rf"{name}.* prepare it again"):
            stored.read_features(tmp_path / f"{name}.safetensors")


def test_the_command_stores_what_the_text_encoders_of_a_model_say(
    manifest: Path, tmp_path: Path
):
    model, to = write_miniflux(tmp_path / "model"), tmp_path / "text"
    given = {"text": True, "to": str(to), "model": str(model), "dtype": "float32"}
    with flagsaver.flagsaver(**given, manifest=str(manifest), batch=4):
        prepare.main(flags.FLAGS)
    mesh = sharding.device_mesh(data=1, fsdp=8)
    text = prompts.load_prompt_encoder(model, "float32", mesh)(CAPTIONS)
    for i, record in enumerate(read_manifest(to / "manifest.jsonl")):
        tokens, pooled = stored.read_features(record.features)
        known = np.asarray(text.segment[i]) >= 0
        expected = np.asarray(text.features)[i][known]
        np.testing.assert_allclose(tokens.astype(np.float32), expected, atol=2e-2)
        assert pooled.shape == (1, 8)
    names = json.loads((to / "manifest.jsonl").read_text().splitlines()[0])
    assert names["text_fea"] == storage.features_path(to, CAPTIONS[0]).name


# ----------------------------------------------------------------------------- training


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Videos whose captions have 3 and 4 tokens, with features."""
    paths = [tmp_path / f"{i}.mp4" for i in range(6)]
    records = [Record(p, "video", str(10 + 90 * (i % 2))) for i, p in enumerate(paths)]
    write_manifest(tmp_path / "clips.jsonl", records)
    manifest = storage.write_features(
        tmp_path / "clips.jsonl", tmp_path / "text", Lengths()
    )
    return list(read_manifest(manifest))


def of_segments(rows: Rows) -> list[tuple[list[float], list[float]]]:
    """First value of every text token, and the pooled vector, of each segment."""
    return [
        (
            rows.text[row][rows.text_segment[row] == index][:, 0].tolist(),
            rows.pooled[row, index].tolist(),
        )
        for row, index in zip(*np.nonzero(rows.stage >= 0), strict=True)
    ]


def test_rows_hold_the_stored_features_of_their_captions(
    records: list[Record], tmp_path: Path
):
    rows = take(1, config(tmp_path, records), tmp_path, tokenize=None)[0]
    assert rows.text.shape == (2, 12, 2) and rows.pooled.shape == (2, 5, 1)
    assert rows.text.dtype == rows.pooled.dtype == jnp.bfloat16
    found = of_segments(rows)
    assert {len(tokens) for tokens, _ in found} == {3, 4}
    for tokens, pooled in found:
        size = len(tokens) - 1
        assert (tokens, pooled) == (list(range(19 - size, 20)), [size])
    assert not rows.text[rows.text_segment == -1].any()


def test_a_dropped_caption_has_the_features_of_the_empty_one(
    records: list[Record], tmp_path: Path
):
    cfg = config(tmp_path, records, dropout=0.5)
    rows = take(4, cfg, tmp_path, tokenize=None)
    found = [segment for batch in rows for segment in of_segments(batch)]
    dropped = [pooled == [0] for _, pooled in found]
    assert 0.2 < np.mean(dropped) < 0.8
    assert all(tokens == [19] for tokens, pooled in found if pooled == [0])


def test_a_model_without_an_encoder_trains_on_stored_features(
    records: list[Record], tmp_path: Path
):
    rows = take(1, config(tmp_path, records), tmp_path, tokenize=None)[0]
    small = {"width": 16, "heads": 1, "double_blocks": 1, "text_width": 2}
    small |= {"pooled_width": 1, "patch_values": 12, "rope_axes": (16,)}
    latent = {"channels": 3, "spatial": 1, "temporal": 1}
    model = model_config(
        {"variant": "mmdit", "dit": small, "layout": vars(LAYOUT), "latent": latent}
    )
    params = jax.eval_shape(partial(initialise, model), jax.random.key(0))
    value, _ = jax.eval_shape(
        partial(training_loss, model), unbox(params), rows, jax.random.key(1)
    )
    assert value.shape == ()


def test_records_without_features_are_counted_at_the_start(tmp_path: Path):
    with (
        pytest.raises(ValueError, match=r"12 of 12 records name no features"),
        opened(config(tmp_path), tmp_path, tokenize=None),
    ):
        pass


def test_features_of_the_empty_caption_must_be_there(
    records: list[Record], tmp_path: Path
):
    (tmp_path / "text" / stored.EMPTY).unlink()
    with pytest.raises(ValueError, match=r"text has no empty\.safetensors"):
        stored.check_features(records)


def test_features_that_are_gone_make_a_bad_record(
    records: list[Record], tmp_path: Path
):
    storage.features_path(tmp_path / "text", "10").unlink()
    cfg = config(tmp_path, records, max_bad=0.3)
    with pytest.raises(ValueError, match="prepare it again"):
        take(9, cfg, tmp_path, tokenize=None)
