# SPDX-License-Identifier: Apache-2.0
"""How full packed training rows are, without and with places for current tokens only.

    python -m benchmarks.packing

In the last block only tokens that are being denoised need more than keys and values. A
compiled step could leave out the others where these have places of their own in every
row, a fixed number, so that a row has two budgets. The table says what that costs: the
share of a row's places that tokens take, with one budget, and with the best two.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from pyramid_jax import layout

STAGES, OPEN = 3, 8  # rows that are filled at once
SEGMENTS = 3000


class Training(NamedTuple):
    """Units of a video, tokens of a frame at the finest stage, places of a row.

    Every so many videos an image is trained, too; 0: none.
    """

    name: str
    units: int
    finest: int
    places: int
    videos_per_image: int


def segments(training: Training) -> Iterator[tuple[int, int]]:
    """History and current tokens of one segment after the other, without end."""
    for turn in itertools.count():
        fine, coarser = layout.balanced_units(turn, training.units, training.units)
        for stage in range(STAGES):
            unit = fine if stage == STAGES - 1 else coarser
            clips = layout.compact(layout.clips(stage, unit, unit + 1))
            sizes = [training.finest // 4 ** (STAGES - 1 - c.stage) for c in clips]
            *past, now = (n * len(c.frame) for n, c in zip(sizes, clips, strict=True))
            yield sum(past), now
        if training.videos_per_image and turn % training.videos_per_image == 0:
            yield 0, training.finest


@cache
def first_segments(training: Training, count: int) -> list[tuple[int, int]]:
    """So many segments."""
    return list(itertools.islice(segments(training), count))


def fullness(training: Training, current: int | None = None) -> float:
    """The share of places that are taken; segments go into the first row that fits.

    Args:
        current: places of a row that are for current tokens; None: any token takes any.
    """
    budget = [training.places]
    if current is not None:
        budget = [training.places - current, current]
    rows: list[np.ndarray] = []
    taken: list[int] = []
    for both in first_segments(training, SEGMENTS):
        needed = np.array([sum(both)] if current is None else both)
        fitting = [row for row in rows if (row + needed <= budget).all()]
        if fitting:
            fitting[0] += needed
            continue
        if len(rows) == OPEN:
            taken.append(int(rows.pop(0).sum()))
        rows.append(needed)
    return float(np.mean(taken)) / training.places


def best_of_two(training: Training) -> tuple[float, int]:
    """The largest fullness with two budgets, and the places for current tokens."""
    choices = np.linspace(training.finest, 0.7 * training.places, 24).astype(int)
    return max((fullness(training, int(n)), int(n)) for n in choices)


def main() -> None:
    """Prints the table."""
    print("| rows | one budget | two | places for current tokens |")
    print("|---|---|---|---|")
    for name, units, finest, places in (
        ("384p, 5 s", 16, 960, 4224),
        ("768p, 10 s", 31, 3840, 24_064),
    ):
        for image in (0, 4, 1):
            one = Training(name, units, finest, places, image)
            title = f"{name}, an image for {image} videos" if image else name
            two, current = best_of_two(one)
            print(f"| {title} | {fullness(one):.3f} | {two:.3f} | {current} |")


if __name__ == "__main__":
    main()
