# SPDX-License-Identifier: Apache-2.0
"""Adherence counts what videos show, over windows and with a floor."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from launch.pairs import adherence
from launch.pairs.adherence import held_out, sampled, windows

PAIRS = held_out(3, seed=2)
OPTIONS: dict[str, Any] = dict(
    task="t2v", batch=2, frames=17, seed=4, steps=None, video_steps=None
) | dict(guidance=None, video_guidance=2.0)


class Recorded:
    """A model that shows the number of its call, and keeps what it was asked."""

    def __init__(self):
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, prompts: list[str], **choices: Any) -> SimpleNamespace:
        self.calls.append((prompts, choices))
        shape = (len(prompts), choices["num_frames"], 64, 64, 3)
        return SimpleNamespace(frames=np.full(shape, len(self.calls), np.uint8))


def test_windows_end_with_the_video_and_share_a_frame():
    assert windows(1) == [(0, 1)] and windows(17) == [(0, 17)]
    assert windows(49) == [(0, 17), (16, 33), (32, 49)]


def test_real_clips_show_what_their_captions_say():
    clips = [each.pixels for each in PAIRS]
    assert adherence.adherence(clips, PAIRS, moving=True)["all"] >= 2
    black = [np.zeros_like(clip) for clip in clips]
    assert adherence.adherence(black, PAIRS, moving=True)["all"] == 0


def test_every_caption_is_sampled_once_in_batches_of_one_size():
    model: Any = Recorded()
    videos = sampled(model, PAIRS, SimpleNamespace(**OPTIONS))
    assert [len(prompts) for prompts, _ in model.calls] == [2, 2]
    assert [video[0, 0, 0, 0] for video in videos] == [1, 1, 2]
    assert [choices["seed"] for _, choices in model.calls] == [4, 6]
    assert model.calls[0][1]["image"] is None


def test_image_to_video_gives_every_video_its_first_frame():
    model: Any = Recorded()
    sampled(model, PAIRS, SimpleNamespace(**OPTIONS | {"task": "i2v"}))
    for (prompts, choices), each in zip(model.calls, PAIRS, strict=True):
        assert prompts == [each.text]
        np.testing.assert_array_equal(choices["image"], each.pixels[0])


def test_the_table_has_intervals_and_distances():
    right = {"colours": 3, "kinds": 2, "all": 1}
    text = adherence.adherence_table({"model": {"right": right, "frechet": 1.5}}, 4)
    assert "| model | 75.0% (30.1% to 95.4%) |" in text and text.endswith("| 1.500 |")
