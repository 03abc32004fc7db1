# SPDX-License-Identifier: Apache-2.0
"""The embedded clips show what their captions say, and a tokenizer reads the captions.

Both depend on their arguments alone.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch import moving_shapes
from launch.moving_shapes import BACKGROUND, COLOURS, DIRECTIONS, Settings
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.data.video_io import read_video
from pyramid_jax.pipeline.folder import TINY

# Small pictures keep these tests quick; the laws hold at any size.
SMALL = Settings(size=32, frames=3, step=2, diameter=(12, 14), jitter=6, grid=1)


def contents(folder):
    """The bytes of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_captions_are_sentences_that_can_be_parsed():
    captions = moving_shapes.captions()
    assert len({caption.text for caption in captions}) == len(captions) == 144
    assert all(moving_shapes.parse(caption.text) == caption for caption in captions)
    assert moving_shapes.parse("a red circle moves left") == ("red", "circle", "left")


def test_an_unknown_sentence_is_refused_with_the_known_words():
    with pytest.raises(ValueError, match=r"'a pink circle moves left'.*'red'.*'left'"):
        moving_shapes.parse("a pink circle moves left")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        SMALL,
        Settings(size=32, frames=3, step=3, diameter=(12, 14), jitter=6),
    ],
    ids=["default", "small", "way is no multiple of the grid"],
)
def test_a_shape_moves_by_its_step_and_stays_inside(settings):
    """Each frame is the previous one, moved, and nothing leaves the picture."""
    rng = np.random.default_rng(0)
    for caption in moving_shapes.captions():
        video = moving_shapes.render(caption, rng, settings)
        step = np.array(DIRECTIONS[caption.direction]) * settings.step
        for before, after in itertools.pairwise(video):
            np.testing.assert_array_equal(np.roll(before, step, (0, 1)), after)
            place = np.argwhere((before != BACKGROUND).any(-1)) + step
            assert place.min() >= 0 and place.max() < settings.size


def test_a_shape_has_its_colour_and_a_sensible_size():
    rng = np.random.default_rng(0)
    for caption in moving_shapes.captions()[::7]:
        frame = moving_shapes.render(caption, rng)[0]
        colours, counts = np.unique(frame.reshape(-1, 3), axis=0, return_counts=True)
        common = {tuple(colours[i]) for i in np.argsort(counts)[-2:].tolist()}
        assert common == {BACKGROUND, COLOURS[caption.colour]}
        y, x = np.nonzero((frame != BACKGROUND).any(-1))
        assert 42 <= max(np.ptp(y), np.ptp(x)) + 1 <= 56


def test_sizes_and_paths_vary_around_the_centre_in_steps_of_the_grid():
    rng, offsets, sizes = np.random.default_rng(0), set(), set()
    caption = moving_shapes.parse("a red cross moves up")
    for _ in range(200):
        video = moving_shapes.render(caption, rng)
        first, last = (np.argwhere((f != BACKGROUND).any(-1)) for f in video[[0, -1]])
        middle = (first.min(0) + last.max(0) + 1) / 2 - 64
        offsets.add(tuple(middle.tolist()))
        sizes.add(int(np.ptp(first[:, 0])) + 1)
    assert sizes == {48, 50, 52, 54, 56}
    assert offsets == set(itertools.product((-8, -4, 0, 4, 8), repeat=2))


def test_shapes_differ_clearly_from_each_other():
    """Any two shapes of one size differ in a tenth of the larger one's area."""
    masks = [moving_shapes._mask(shape, 48) for shape in moving_shapes.SHAPES]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert np.abs(one - other).sum() > 0.1 * max(one.sum(), other.sum())


def test_a_data_set_depends_on_its_arguments_only(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        moving_shapes.write_dataset(folder, 3, 0, SMALL)
    assert contents(one) == contents(other)
    longer, reseeded = tmp_path / "longer", tmp_path / "reseeded"
    moving_shapes.write_dataset(longer, 5, 0, SMALL)
    moving_shapes.write_dataset(reseeded, 3, 1, SMALL)
    clips = {k: v for k, v in contents(one).items() if k.endswith("mp4")}
    assert len(clips) == 3 and clips.items() <= contents(longer).items()
    assert not clips.items() & contents(reseeded).items()


def test_files_can_be_read_at_a_quarter_of_their_size_in_their_colours(tmp_path):
    records = read_manifest(moving_shapes.write_dataset(tmp_path / "set", 12, 0))
    for record in records:
        video = read_video(record.path, (32, 32), 8, 8)
        caption = moving_shapes.parse(record.text)
        distance = np.abs(video.astype(int) - COLOURS[caption.colour]).max(-1)
        assert (distance < 25).sum((1, 2)).min() > 15
        background = np.median(video, (1, 2))
        assert np.abs(background - BACKGROUND).max() <= 2


def test_all_captions_are_equally_frequent(tmp_path):
    settings = Settings(size=16, frames=1, step=1, diameter=(8, 8), jitter=4, grid=1)
    records = read_manifest(moving_shapes.write_dataset(tmp_path, 288, 0, settings))
    assert set(Counter(record.text for record in records).values()) == {2}


def test_a_complete_folder_is_used_as_it_is(tmp_path):
    manifest = moving_shapes.write_dataset(tmp_path / "set", 2, 0, SMALL)
    marked = tmp_path / "set" / "clips" / "00000.mp4"
    marked.write_text("left alone")
    assert moving_shapes.write_dataset(tmp_path / "set", 2, 0, SMALL) == manifest
    assert marked.read_text() == "left alone"


def test_an_interrupted_folder_is_completed(tmp_path):
    manifest = moving_shapes.write_dataset(tmp_path / "set", 2, 0, SMALL)
    whole = contents(tmp_path / "set")
    manifest.unlink()
    (tmp_path / "set" / "clips" / "00001.mp4").write_text("half a fi")
    moving_shapes.write_dataset(tmp_path / "set", 2, 0, SMALL)
    assert contents(tmp_path / "set") == whole


def test_another_data_set_in_the_folder_is_refused(tmp_path):
    moving_shapes.write_dataset(tmp_path, 2, 0, SMALL)
    with pytest.raises(ValueError, match=r'holds .*"seed": 0.*expected .*"seed": 1'):
        moving_shapes.write_dataset(tmp_path, 2, 1, SMALL)
    assert json.loads((tmp_path / "dataset.json").read_text())["seed"] == 0


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="files of another kind"):
        moving_shapes.write_dataset(tmp_path, 2, 0, SMALL)
    assert contents(tmp_path) == {"manifest.jsonl": b"mine"}


def test_impossible_settings_are_refused():
    with pytest.raises(
        ValueError, match="leave 0 of 32 pixels, expected 2 x jitter = 16"
    ):
        Settings(size=32, step=2, diameter=(12, 18))
    with pytest.raises(ValueError, match="clips is 0"):
        moving_shapes.write_dataset("unused", 0, 0)


# -------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [caption.text for caption in moving_shapes.captions()]
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    return moving_shapes.train_tokenizer(texts, 384, path)


def test_words_of_the_captions_are_one_token_each(tokenizer: Path):
    ids = load_tokenizer(tokenizer)("a red circle moves left")
    assert len(ids) == 5 + 1 and len(set(ids)) == 6


def test_any_text_has_tokens_below_the_vocabulary(tokenizer: Path):
    ids = load_tokenizer(tokenizer)("Ein purpurner Tintenfisch, 東京 \N{SQUID}!")
    assert len(ids) > 10 and all(0 <= i < 384 for i in ids)


def test_the_empty_text_is_the_end_alone(tokenizer: Path):
    tokenize = load_tokenizer(tokenizer)
    assert tokenize("") == tokenize("a red circle moves left")[-1:]


def test_training_is_reproducible_and_made_the_committed_file(tokenizer: Path):
    assert tokenizer.read_text() == (TINY / "tokenizer.json").read_text()


def test_a_vocabulary_must_hold_all_bytes(tmp_path: Path):
    with pytest.raises(ValueError, match="vocabulary 100 must hold 256 bytes"):
        moving_shapes.train_tokenizer(["a"], 100, tmp_path / "t.json")
