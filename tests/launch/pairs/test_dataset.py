# SPDX-License-Identifier: Apache-2.0
"""Bouncing pairs as arrays and as files are the same, whole and reproducible."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from launch.pairs.dataset import pair, pairs, texts, write_pairs
from launch.pairs.scene import Settings
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.source import read_pixels
from pyramid_jax.data.tokenizer import load_tokenizer

TOKENIZER = "pyramid_jax/assets/pairs/tokenizer.json"
SHORT = Settings(frames=5)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_pairs_are_videos_and_images_with_captions():
    some = list(islice(pairs(settings=SHORT), 10))
    assert [each.kind for each in some].count("image") == 2
    assert all(len(each.pixels) == (5 if each.kind == "video" else 1) for each in some)
    assert len({each.text for each in some}) == 10


def test_a_pair_is_the_same_wherever_it_is_drawn():
    third = list(islice(pairs(7, "held out", SHORT), 4))[3]
    again = pair(3, 7, "held out", SHORT)
    assert (third.text, third.actors) == (again.text, again.actors)
    np.testing.assert_array_equal(third.pixels, again.pixels)


def test_an_image_is_the_first_frame_of_the_video_of_its_number():
    video, image = (pair(0, settings=SHORT, kind=kind) for kind in ("video", "image"))
    np.testing.assert_array_equal(image.pixels[0], video.pixels[0])
    assert image.actors == video.actors


def test_files_show_the_pairs(tmp_path: Path):
    records = read_manifest(write_pairs(tmp_path, 5, settings=SHORT))
    assert [record.kind for record in records] == ["video"] * 4 + ["image"]
    for number, record in enumerate(records):
        drawn = pair(number, settings=SHORT)
        assert record.text == drawn.text
        read = read_pixels(record, drawn.pixels.shape[1:3], 5, 8.0)
        assert abs(read.astype(int) - drawn.pixels).mean() < 4


def test_the_same_arguments_write_the_same_files(tmp_path: Path):
    for name in "ab":
        write_pairs(tmp_path / name, 5, settings=SHORT)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_folder_is_completed_and_a_whole_one_left_alone(tmp_path: Path):
    manifest = write_pairs(tmp_path, 5, settings=SHORT)
    whole = contents(tmp_path)
    manifest.unlink()
    (tmp_path / "videos" / "000001.mp4").write_text("half a fi")
    write_pairs(tmp_path, 5, settings=SHORT)
    assert contents(tmp_path) == whole


def test_other_files_and_no_clips_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="clips is 0"):
        write_pairs(tmp_path, 0)
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="files of another kind"):
        write_pairs(tmp_path, 2)
    assert contents(tmp_path) == {"manifest.jsonl": b"mine"}


def test_every_caption_has_few_tokens_in_the_committed_vocabulary():
    tokenize = load_tokenizer(TOKENIZER)
    lengths = [len(tokenize(text)) for text in texts(200)]
    assert np.mean(lengths) < 16 and max(lengths) <= 32
