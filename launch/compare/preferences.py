# SPDX-License-Identifier: Apache-2.0
"""What the answers of raters amount to: preferences with intervals, and agreement.

Scores are 1 where a rater prefers the first clip of a pair, -1 the second one, and 0
where both are the same to him; NaN where he did not answer. Raters are rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from launch.compare.answers import Answer
from launch.compare.study import LEFT, QUESTIONS, RIGHT, SAME
from launch.moving_shapes import wilson

Scores = Float[np.ndarray, "raters n"]
Interval = tuple[float, float, float]  # a number, and its 95 % interval

_RESAMPLED, _SEED = 10_000, 0  # of bootstrapped intervals


class Preference(NamedTuple):
    """What raters say to one question.

    Attributes:
        wins, ties, losses: answers for the first clip, for neither, for the second.
        win_rate: of the answers for one of them, those for the first, with Wilson's
            interval, which takes answers as independent; None if there are none.
        advantage: wins less losses per answer, bootstrapped over pairs.
        p: of the sign test, over pairs by the majority of their raters.
    """

    wins: int
    ties: int
    losses: int
    win_rate: Interval | None
    advantage: Interval
    p: float


class Agreement(NamedTuple):
    """How far raters say the same of a pair.

    Attributes:
        share: of two answers to a pair, how often they are the same.
        alpha: that as Krippendorff's alpha, 1 if always, 0 if as often as by chance;
            None if all answers of all pairs are the same.
    """

    share: float
    alpha: float | None


def scores_of(answers: Sequence[Answer], pairs: int) -> dict[str, Scores]:
    """The scores for every question, raters in alphabetical order."""
    raters = sorted({answer.rater for answer in answers})
    scores = {name: np.full((len(raters), pairs), np.nan) for name in QUESTIONS}
    for answer in answers:
        left = 1 if answer.left == 0 else -1
        value = {LEFT: left, SAME: 0, RIGHT: -left}
        for name, choice in answer.choices.items():
            scores[name][raters.index(answer.rater), answer.pair] = value[choice]
    return scores


def preference(scores: Scores) -> Preference:
    """What raters prefer; there must be an answer."""
    wins, ties, losses = (int((scores == value).sum()) for value in (1, 0, -1))
    decided = wins + losses
    return Preference(
        *(wins, ties, losses),
        (wins / decided, *wilson(wins, decided)) if decided else None,
        advantage(scores),
        sign_test(scores),
    )


def advantage(scores: Scores) -> Interval:
    """The mean score, with an interval bootstrapped over pairs.

    A pair is drawn with all its answers, since those are not independent.
    """
    scores = scores[:, ~np.isnan(scores).all(axis=0)]
    sums, counts = np.nansum(scores, axis=0), (~np.isnan(scores)).sum(axis=0)
    rng = np.random.default_rng(_SEED)
    draws = rng.integers(0, len(sums), (_RESAMPLED, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return float(sums.sum() / counts.sum()), low, high


def sign_test(scores: Scores) -> float:
    """How likely pairs are decided as unevenly as these if neither side is better.

    Each pair counts once, for the side that more of its raters prefer; pairs without
    one count for nothing.
    """
    majority = np.sign(np.nansum(scores, axis=0))
    wins, decided = int((majority > 0).sum()), int((majority != 0).sum())
    return float(stats.binomtest(wins, decided).pvalue) if decided else 1.0


def agreement(scores: Scores) -> Agreement | None:
    """How far raters agree; None if no pair has two.

    α = 1 - (share of differing answers) / (that of answers drawn from all pairs)

    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), nominal
    data.
    """
    values = np.unique(scores[~np.isnan(scores)])
    counts = (scores == values[:, None, None]).sum(axis=1)  # of a value, in a pair
    raters = counts.sum(axis=0)
    counts, raters = counts[:, raters > 1], raters[raters > 1]
    if not raters.size:
        return None
    same = (counts * (counts - 1) / (raters - 1)).sum()
    each, total = counts.sum(axis=1), raters.sum()
    by_chance = (each * (each - 1)).sum() / (total - 1)
    alpha = 1 - (total - same) / (total - by_chance) if by_chance < total else None
    return Agreement(float(same / total), None if alpha is None else float(alpha))


def left_rate(answers: Sequence[Answer]) -> Interval | None:
    """How often raters prefer what is on the left, which should be half the time."""
    choices = [choice for answer in answers for choice in answer.choices.values()]
    left, decided = choices.count(LEFT), len(choices) - choices.count(SAME)
    return (left / decided, *wilson(left, decided)) if decided else None


def report_of(manifest: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """The results of a study as JSON.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("nobody has rated a pair yet; start the page, and rate some")
    pairs = len(manifest["pairs"])
    raters = [answer.rater for answer in answers]
    questions = {}
    for name, scores in scores_of(answers, pairs).items():
        same = agreement(scores)
        questions[name] = preference(scores)._asdict() | {
            "agreement": same and same._asdict()
        }
    return {
        "names": manifest["names"],
        "pairs": pairs,
        "raters": {rater: raters.count(rater) for rater in sorted({*raters})},
        "left": left_rate(answers),
        "questions": questions,
    }


def preference_table(report: dict[str, Any]) -> str:
    """The results of a study as Markdown."""
    first, second = report["names"]
    columns = [
        *(f"{report['pairs']} pairs", f"{first} wins", "ties", f"{second} wins"),
        *("win rate", "advantage", "sign test", "agreement (α)"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in report["questions"].items():
        rate, same = row["win_rate"], row["agreement"]
        cells = [
            *(name, *(str(row[count]) for count in ("wins", "ties", "losses"))),
            "{:.1%} ({:.1%} to {:.1%})".format(*rate) if rate else "",
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["advantage"]),
            f"p = {row['p']:.3g}",
            _agreement_cell(**same) if same else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rated = [f"{rater} {count}" for rater, count in report["raters"].items()]
    lines += ["", f"answers: {', '.join(rated)}"]
    if left := report["left"]:
        lines.append("on the left: {:.1%} ({:.1%} to {:.1%})".format(*left))
    return "\n".join(lines)


def _agreement_cell(share: float, alpha: float | None) -> str:
    return f"{share:.1%}" if alpha is None else f"{share:.1%} ({alpha:.2f})"
