# SPDX-License-Identifier: Apache-2.0
"""The judge of bouncing pairs sees what was drawn, and tells real clips from damage."""

import numpy as np
import pytest

from launch.evaluate.distances import frechet
from launch.pairs.dataset import Pair, pair
from launch.pairs.judge import Verdict, clip_features, judge_pair
from launch.pairs.scene import Actor, Settings
from launch.pairs.train_judge import examples

RED, BLUE = Actor("red", "circle", "sideways"), Actor("blue", "seven", "up and down")


@pytest.fixture(scope="module")
def clips() -> list[Pair]:
    return [pair(i, 5, "held out", kind="video") for i in range(40)]


@pytest.fixture(scope="module")
def features(clips: list[Pair]) -> np.ndarray:
    return clip_features([clip.pixels for clip in clips])


def test_almost_every_held_out_clip_is_understood(clips: list[Pair]):
    rows = [judge_pair(clip.pixels).right(clip.actors) for clip in clips]
    assert np.mean([row["colours"] for row in rows]) >= 0.95
    assert np.mean([row["kinds"] for row in rows]) >= 0.9
    assert np.mean([row["motions"] for row in rows]) >= 0.95


def test_images_have_no_motion_and_long_clips_keep_theirs(clips: list[Pair]):
    image = judge_pair(clips[0].pixels[:1])
    assert all(actor.motion == "" for actor in image.actors)
    long = pair(0, 5, "held out", Settings(frames=49), "video")
    assert judge_pair(long.pixels).right(long.actors)["motions"]


def test_a_clip_without_objects_shows_nothing():
    assert judge_pair(np.full((3, 64, 64, 3), 60, np.uint8)).actors == ()


def test_a_verdict_is_right_only_if_it_names_what_is_expected():
    both = Verdict((BLUE, RED)).right((RED, BLUE))
    assert both == {"colours": True, "kinds": True, "motions": True}
    green = RED._replace(colour="green")
    assert not any(Verdict((green, BLUE)).right((RED, BLUE)).values())
    assert not Verdict((RED, BLUE, green)).right((RED, BLUE))["colours"]
    swapped = Verdict((RED._replace(kind="seven"), BLUE._replace(kind="circle")))
    assert swapped.right((RED, BLUE)) == both | {"kinds": False}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("noisy", "shuffled")]


@pytest.mark.parametrize("damage", ["still", *SLOW])
def test_damage_is_farther_from_real_clips_than_other_real_clips(
    clips: list[Pair], features: np.ndarray, damage: str
):
    rng = np.random.default_rng(0)
    second = [clip.pixels for clip in clips[20:]]
    worse = {
        "still": [np.repeat(clip[:1], len(clip), axis=0) for clip in second],
        "noisy": [
            (clip + rng.normal(0, 25, clip.shape)).clip(0, 255).astype(np.uint8)
            for clip in second
        ],
        "shuffled": [rng.permutation(clip) for clip in second],
    }[damage]
    real, floor = features[:20], features[20:]
    assert frechet(real, clip_features(worse)) > 1.1 * frechet(real, floor)


def test_examples_name_the_places_of_their_objects():
    some = examples(6, seed=1)
    for pixels, kinds, places in zip(*some, strict=True):
        assert pixels.shape == (64, 64, 3) and (kinds >= 0).sum() <= 2
        assert (places[kinds < 0] == 0).all() and (places < 64).all()
