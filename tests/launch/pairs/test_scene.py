# SPDX-License-Identifier: Apache-2.0
"""Scenes of bouncing pairs are valid at any time, and follow from their numbers."""

import numpy as np
import pytest

from launch.pairs.scene import (
    COLOURS,
    DIGITS,
    KINDS,
    MOTIONS,
    Path,
    Settings,
    scene,
)

SCENES = [scene(number) for number in range(60)]


def test_a_scene_follows_from_seed_number_and_split():
    pixels = scene(3, seed=1).film(2)
    np.testing.assert_array_equal(scene(3, seed=1).film(2), pixels)
    for other in (scene(4, seed=1), scene(3, seed=2), scene(3, 1, "held out")):
        assert other.film(2).shape != pixels.shape or (other.film(2) != pixels).any()


def test_longer_films_begin_like_shorter_ones():
    np.testing.assert_array_equal(SCENES[0].film(33)[:5], SCENES[0].film(5))


def test_objects_stay_inside_the_frame_for_ever():
    for each in SCENES:
        for path, mask in zip(each.paths, each.masks, strict=True):
            places = np.array([path.place(time) for time in range(100)])
            assert (places >= 0).all()
            assert (places + len(mask) / 4 <= np.array(each.size) - 1).all()


def test_an_object_is_reflected_by_the_wall_that_it_reaches():
    path = Path(np.array([0.0, 7.0]), np.array([0.0, 2.0]), np.array([10.0, 10.0]))
    assert [path.place(time)[1] for time in range(5)] == [7, 9, 9, 7, 5]
    assert [path.place(time)[0] for time in range(5)] == [0] * 5


def test_objects_move_as_their_motion_says():
    for each in SCENES:
        for actor, path in zip(each.actors, each.paths, strict=True):
            np.testing.assert_array_equal(
                abs(path.step) > 0, np.array(MOTIONS[actor.motion]) > 0
            )


def test_the_two_objects_differ_and_begin_apart():
    for each in SCENES:
        first, second = each.actors
        assert first.colour != second.colour and first.kind != second.kind
        sides = [len(mask) / 4 for mask in each.masks]
        middles = [p.start + s / 2 for p, s in zip(each.paths, sides, strict=True)]
        assert np.linalg.norm(middles[0] - middles[1]) > sum(sides) / 2


def test_every_word_and_both_sizes_occur():
    actors = [actor for number in range(400) for actor in scene(number).actors]
    colours, kinds, motions = map(set, zip(*actors, strict=True))
    assert (colours, kinds, motions) == (set(COLOURS), set(KINDS), set(MOTIONS))
    assert {each.size for each in SCENES} == {(64, 64), (64, 96)}
    digits = np.mean([actor.kind in DIGITS for actor in actors])
    assert 0.42 < digits < 0.58


def test_objects_show_their_colours_over_a_dim_and_moving_background():
    for each in SCENES[:20]:
        frame = each.film(1)[0]
        front, path = each.actors[1], each.paths[1]
        near = np.abs(frame - np.array(COLOURS[front.colour])).max(-1) < 3
        assert near.sum() > 40
        y, x = np.argwhere(near).min(axis=0)
        assert (abs(path.start - (y, x)) < len(each.masks[1]) / 4).all()
        assert np.median(frame) < 130
        first, later = (each.film(2)[i].astype(int) for i in (0, 1))
        assert (abs(first - later).max(-1) > 0).mean() > 0.3


def test_held_out_scans_are_not_trained_on():
    seen = {
        split: {
            mask[::4, ::4].tobytes()
            for number in range(100)
            for mask, actor in zip(
                scene(number, 0, split).masks,
                scene(number, 0, split).actors,
                strict=True,
            )
            if actor.kind in DIGITS
        }
        for split in ("training", "held out")
    }
    assert not seen["training"] & seen["held out"]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="frames 0 and fps 8 must be 1 or more"):
        Settings(frames=0)
