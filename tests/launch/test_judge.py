# SPDX-License-Identifier: Apache-2.0
"""The judge is right about real clips, and sees nothing where there is nothing."""

import sys

import numpy as np
import pytest

from launch import moving_shapes
from launch.moving_shapes import Verdict
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.video_io import read_video

NOTHING = Verdict(None, None, None)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Every caption once, as models see it: compressed, decoded and shrunk."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("held_out")
    records = read_manifest(moving_shapes.write_dataset(folder, 144, seed=31))
    return {
        moving_shapes.parse(record.text): read_video(record.path, (32, 32), 8, 8)
        for record in records
    }


@pytest.mark.parametrize("attribute", Verdict._fields)
def test_each_attribute_of_held_out_clips_is_seen(clips, attribute):
    right = [
        getattr(moving_shapes.judge(clip), attribute) == getattr(caption, attribute)
        for caption, clip in clips.items()
    ]
    assert len(right) == 144 and np.mean(right) >= 0.98


def test_a_reversed_clip_moves_the_other_way(clips):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for caption, clip in list(clips.items())[:24]:
        assert moving_shapes.judge(clip[::-1]).direction == opposite[caption.direction]


def test_a_clip_that_moves_askew_has_no_direction():
    video = np.full((2, 32, 32, 3), moving_shapes.BACKGROUND, np.uint8)
    video[0, 2:14, 2:14] = video[1, 14:26, 12:24] = moving_shapes.COLOURS["red"]
    assert moving_shapes._direction(*(frame[..., 0] > 100 for frame in video)) is None
    video[1] = np.roll(video[1], -8, axis=0)
    assert (
        moving_shapes._direction(*(frame[..., 0] > 100 for frame in video)) == "right"
    )


def test_a_clip_that_stands_still_has_no_direction(clips):
    caption, clip = next(iter(clips.items()))
    verdict = moving_shapes.judge(np.stack([clip[0]] * 8))
    assert verdict == Verdict(caption.colour, caption.shape, None)


def test_an_object_that_changes_on_its_way_has_no_shape_or_colour(clips):
    """The judge is not content with one good frame."""
    by_words = {tuple(caption): clip for caption, clip in clips.items()}
    circle = by_words["red", "circle", "left"]
    cross = by_words["red", "cross", "left"]
    green = by_words["green", "circle", "left"]
    assert moving_shapes.judge(np.stack([circle[0], cross[-1]])).shape is None
    assert moving_shapes.judge(np.stack([circle[0], green[-1]])).colour is None


@pytest.mark.parametrize("level", [0, 24, 255])
def test_nothing_is_seen_in_a_blank_clip(level):
    assert moving_shapes.judge(np.full((8, 32, 32, 3), level, np.uint8)) == NOTHING


def test_nothing_is_seen_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 32, 32, 3), np.uint8)
    assert {moving_shapes.judge(clip) for clip in noise} == {NOTHING}


def test_a_colour_outside_the_palette_is_not_named(clips):
    clip = next(clip for caption, clip in clips.items() if caption.shape == "square")
    white = np.where(clip.max(-1, keepdims=True) > 100, 255, clip).astype(np.uint8)
    assert moving_shapes.judge(white).colour is None


def test_intervals_agree_with_published_values():
    """Wilson intervals of 0/10, 10/10 and 81/263, the textbook example."""
    np.testing.assert_allclose(moving_shapes.wilson(0, 10), (0, 0.2775), atol=1e-4)
    np.testing.assert_allclose(moving_shapes.wilson(10, 10), (0.7225, 1), atol=1e-4)
    np.testing.assert_allclose(
        moving_shapes.wilson(81, 263), (0.2553, 0.3662), atol=1e-4
    )


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_an_impossible_count_has_no_interval(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        moving_shapes.wilson(successes, n)


def test_a_missing_library_is_named_with_its_extra(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    moving_shapes._classifier.cache_clear()
    with pytest.raises(ImportError, match=r"pyramid_jax\[demo\]"):
        moving_shapes.judge(next(iter(clips.values())))
