# SPDX-License-Identifier: Apache-2.0
"""Chooses, by what was recorded, how a scenario is replayed."""

from collections.abc import Iterator
from pathlib import Path

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
from launch.parity.arguments import not_replayed
from launch.parity.cases import (
    Case,
    Line,
    Scenario,
    compare,
    read_case,
    read_scenario,
    scenario_files,
)

KINDS = (schedule, dit, targets, steps, sampling, text, vae, vae_losses)


def replay(folder: Path, name: str) -> Iterator[Line]:
    """The lines of every scenario of the case in a folder.

    What can't be read or replayed is one line with the reason; the others go on.
    """
    try:
        case = read_case(folder, name)
    except Exception as error:  # whatever a recorded file can be wrong in
        yield _failure(name, "config.json", error)
        return
    for path in scenario_files(case):
        try:
            lines = list(replay_scenario(case, read_scenario(case, path)))
        except Exception as error:
            lines = [_failure(name, path.stem, error)]
        yield from lines


def replay_scenario(case: Case, scenario: Scenario) -> Iterator[Line]:
    """The lines of one scenario; those of an unknown kind are skipped."""
    if ignored := not_replayed(scenario.settings):
        why = f"recorded with {', '.join(ignored)}, which is not replayed"
        return compare(case, scenario, [], why)
    kinds = [kind for kind in KINDS if kind.fits(scenario)]
    answers = [answer for kind in kinds for answer in kind.replay(case, scenario)]
    return compare(case, scenario, answers)


def _failure(case: str, scenario: str, error: Exception) -> Line:
    reason = " ".join(str(error).split())
    note = f"can't be replayed: {type(error).__name__}: {reason}"
    return Line(case, scenario, "all", "FAIL", note=note)
