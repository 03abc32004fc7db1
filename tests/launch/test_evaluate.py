# SPDX-License-Identifier: Apache-2.0
"""The measure of the embedded model counts what the judge sees."""

import numpy as np

from launch import evaluate, moving_shapes


def test_real_clips_are_right_and_their_neighbours_wrong():
    captions = list(moving_shapes.captions()[::12])
    clips = evaluate.drawn(captions)
    assert set(evaluate.score(captions, clips).values()) == {len(captions)}

    others = captions[1:] + captions[:1]
    wrong = evaluate.score(others, clips)
    assert wrong["all three"] == 0


def test_noise_scores_nothing():
    captions = list(moving_shapes.captions()[:6])
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 32, 32, 3), np.uint8)
    assert set(evaluate.score(captions, noise).values()) == {0}


def test_the_table_has_rates_intervals_and_chance():
    counts = {"shape": 90, "colour": 100, "direction": 50, "all three": 40}
    table = evaluate.table({"model": counts}, 100)
    assert "| model | 90.0% (82.6% to 94.5%) | 100.0% (96.3% to 100.0%) |" in table
    assert "| chance | 16.7% | 16.7% | 25.0% | 0.7% |" in table
