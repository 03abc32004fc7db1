# SPDX-License-Identifier: Apache-2.0
"""Chooses, by what was recorded, how a scenario is replayed."""

from collections.abc import Iterator

from launch.parity import (
    dit,
    sampling,
    schedule,
    steps,
    targets,
    text,
    vae,
    vae_losses,
)
from launch.parity.cases import Case, Line, Scenario, compare, scenarios

KINDS = (schedule, dit, targets, steps, sampling, text, vae, vae_losses)


def replay(case: Case) -> Iterator[Line]:
    """The lines of every scenario of a case."""
    for scenario in scenarios(case):
        yield from replay_scenario(case, scenario)


def replay_scenario(case: Case, scenario: Scenario) -> Iterator[Line]:
    """The lines of one scenario; those of an unknown kind are skipped."""
    kinds = [kind for kind in KINDS if kind.fits(scenario)]
    answers = [answer for kind in kinds for answer in kind.replay(case, scenario)]
    return compare(case, scenario, answers)
