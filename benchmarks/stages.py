# SPDX-License-Identifier: Apache-2.0
"""The Euler steps of sampled videos, by stage: seconds, arithmetic, use of the chip."""

from typing import NamedTuple

import jax

from benchmarks.timing import Spread, spread
from benchmarks.video import Case
from pyramid_jax import flops
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.prompts import LIMIT


class Run(NamedTuple):
    """When one video began, when its Euler steps ended, and when its frames came."""

    began: float
    steps: list[tuple[Progress, float]]
    ended: float


class Stage(NamedTuple):
    """The Euler steps of one stage, in unit 0 or in all later ones.

    `tokens` are those of a row, from the shortest to the longest history; `step` and
    `seconds` are of one step, and of all of them in a video; `flops` counts the latter,
    see `flops`; `utilisation` is a fraction of the chip's peak.
    """

    units: str
    stage: int
    steps: int
    tokens: tuple[int, int]
    step: Spread
    seconds: float
    flops: int
    utilisation: float | None


def by_stage(case: Case, runs: list[Run], text: float) -> list[Stage]:
    """The steps of runs, gathered by stage, unit 0 apart from the others.

    Args:
        text: seconds of the text encoders, which come before the first step.
    """
    times: dict[tuple[bool, int], dict[int, list[float]]] = {}
    for r in runs:
        before = r.began + text
        for at, end in r.steps:
            units = times.setdefault((at.unit > 0, at.stage), {})
            units.setdefault(at.unit, []).append(end - before)
            before = end
    return [
        _stage(case, later, k, units, len(runs)) for (later, k), units in times.items()
    ]


def utilisation(case: Case, count: int, seconds: float) -> float | None:
    """The part of the chip's peak in bfloat16 that this arithmetic used, if known."""
    rate = flops.peak(jax.devices()[0].device_kind)
    if rate is None or case.dtype != "bfloat16":
        return None
    return count / seconds / rate


def _stage(
    case: Case, later: bool, k: int, units: dict[int, list[float]], videos: int
) -> Stage:
    """One stage, from the seconds of its steps by unit."""
    count, tokens = 0, []
    for index, seconds in units.items():
        unit = case.unit(index, k)
        # A prompt and a negative prompt.
        count += 2 * case.step(unit, k) * len(seconds) // videos
        words = 0 if unit.slots is None else LIMIT
        tokens.append(words + sum(case.read(unit, k)))
    steps = [value for seconds in units.values() for value in seconds]
    total = sum(steps) / videos
    return Stage(
        units="later" if later else "first",
        stage=k,
        steps=len(steps) // videos,
        tokens=(min(tokens), max(tokens)),
        step=spread(steps),
        seconds=total,
        flops=count,
        utilisation=utilisation(case, count, total),
    )
