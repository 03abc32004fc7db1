# SPDX-License-Identifier: Apache-2.0
"""Statistics of preferences, with values that can be checked by hand or in books."""

import json

import numpy as np
import pytest

from launch.compare import preferences
from launch.compare.answers import Answer
from launch.compare.preferences import Agreement, agreement, preference, sign_test
from launch.compare.study import QUESTIONS
from launch.moving_shapes import wilson

NAN = np.nan


def row(*counts: int) -> np.ndarray:
    """The scores of one rater: so many wins, ties and losses."""
    return np.repeat([1.0, 0.0, -1.0], counts)[None]


def test_wins_ties_and_losses_are_counted_with_their_intervals():
    found = preference(row(30, 10, 10))
    assert found[:3] == (30, 10, 10)
    assert found.win_rate == (0.75, *wilson(30, 40))
    mean, low, high = found.advantage
    # The deviation of a mean of 50 scores of variance 0.8 - 0.4².
    error = 1.96 * np.sqrt(0.64 / 50)
    assert mean == 0.4
    np.testing.assert_allclose([low, high], [mean - error, mean + error], atol=0.02)


def test_the_sign_test_is_exact():
    assert sign_test(row(5, 3, 0)) == pytest.approx(2 / 2**5)
    assert sign_test(row(9, 0, 1)) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(row(4, 0, 4)) == 1.0


def test_only_ties_decide_nothing():
    found = preference(row(0, 6, 0))
    assert found.win_rate is None and found.p == 1.0
    assert found.advantage == (0.0, 0.0, 0.0)


def test_pairs_are_drawn_with_all_their_answers():
    """Answers that many raters repeat make no interval narrower."""
    one = row(12, 4, 8)
    many = np.repeat(one, 5, axis=0)
    assert preference(many).advantage == pytest.approx(preference(one).advantage)
    assert sign_test(many) == sign_test(one)


def test_a_pair_counts_once_in_the_sign_test_for_its_majority():
    scores = np.array([[1, 1, -1, 0], [1, 0, -1, NAN], [-1, NAN, 1, NAN]])
    assert sign_test(scores) == sign_test(row(2, 1, 1))


def test_pairs_that_nobody_has_rated_say_nothing():
    scores = np.concatenate([row(7, 2, 3), np.full((1, 5), NAN)], axis=1)
    assert preference(scores) == preference(row(7, 2, 3))
    assert agreement(scores) is None


def test_agreement_is_krippendorffs():
    """His example of nominal data with missing values, whose α is 0.743."""
    observers = """
        1 2 3 3 2 1 4 1 2 . . .
        1 2 3 3 2 2 4 1 2 5 . 3
        . 3 3 3 2 3 4 2 2 5 1 .
        1 2 3 3 2 4 4 1 2 5 1 .
    """
    rows = [line.replace(".", "nan").split() for line in observers.split("\n")]
    found = agreement(np.array([row for row in rows if row], float))
    assert found is not None and found.alpha == pytest.approx(0.743, abs=5e-4)


def test_agreement_by_chance_is_zero_and_without_difference_unknown():
    rng = np.random.default_rng(0)
    found = agreement(rng.integers(-1, 2, (2, 20_000)).astype(float))
    assert found is not None and found.alpha == pytest.approx(0, abs=0.02)
    assert found.share == pytest.approx(1 / 3, abs=0.02)
    assert agreement(np.ones((3, 4))) == Agreement(1.0, None)
    assert agreement(np.array([[1, -1.0], [1, -1.0]])) == Agreement(1.0, 1.0)


def answers(*sides: tuple[int, str]) -> list[Answer]:
    """Anna's answers to pairs, each with the clip on the left and her choice."""
    return [
        Answer("anna", pair, left, dict.fromkeys(QUESTIONS, choice))
        for pair, (left, choice) in enumerate(sides)
    ]


def test_a_choice_of_a_side_is_one_for_the_clip_that_was_there():
    given = answers((0, "left"), (1, "left"), (0, "right"), (1, "right"), (1, "same"))
    given.append(Answer("bo", 1, 0, dict.fromkeys(QUESTIONS, "left")))
    for scores in preferences.scores_of(given, 6).values():
        np.testing.assert_array_equal(scores[0], [1, -1, -1, 1, 0, NAN])
        np.testing.assert_array_equal(scores[1], [NAN, 1, NAN, NAN, NAN, NAN])


def test_a_rater_who_always_says_left_is_seen():
    given = answers(*[(i % 2, "left") for i in range(10)])
    assert preferences.left_rate(given) == (1.0, *wilson(30, 30))
    report = preferences.report_of({"names": ["a", "b"], "pairs": [{}] * 10}, given)
    assert [x["win_rate"][0] for x in report["questions"].values()] == [0.5] * 3
    assert preferences.left_rate(answers((0, "same"))) is None


def test_a_report_is_a_table_and_json():
    manifest = {"names": ["old", "new"], "pairs": [{}] * 4}
    given = answers((0, "left"), (0, "left"), (0, "same"), (1, "left"))
    given += [each._replace(rater="bo") for each in given[:3]]
    report = preferences.report_of(manifest, given)
    assert json.loads(json.dumps(report, allow_nan=False))["raters"] == {
        "anna": 4,
        "bo": 3,
    }
    table = preferences.preference_table(report)
    assert "| 4 pairs | old wins | ties | new wins |" in table
    assert "| aesthetic quality | 4 | 2 | 1 | 80.0% (" in table
    assert "| 100.0% (1.00) |" in table and "answers: anna 4, bo 3" in table
    with pytest.raises(ValueError, match="nobody has rated a pair yet; start the page"):
        preferences.report_of(manifest, [])
