# SPDX-License-Identifier: Apache-2.0
"""Chooses, by what was recorded, how a scenario is replayed."""

from collections.abc import Iterator

from launch.parity import dit, sampling, schedule, targets
from launch.parity.cases import Case, Line, compare, scenarios

KINDS = (schedule, dit, targets, sampling)


def replay(case: Case) -> Iterator[Line]:
    """The lines of every scenario of a case."""
    for scenario in scenarios(case):
        answers = [
            a for k in KINDS if k.fits(scenario) for a in k.replay(case, scenario)
        ]
        yield from compare(case, scenario, answers)
