# SPDX-License-Identifier: Apache-2.0
"""What was recorded from the original implementation is what this package computes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.parity.__main__ import main
from launch.parity.cases import (
    NO_WEIGHTS,
    Answer,
    Case,
    Line,
    Scenario,
    compare,
    find,
    scenarios,
)
from launch.parity.run import KINDS, replay_scenario

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = {case.name: case for case in find(GOLDEN)}
RECORDED = [
    (case.name, path.stem)
    for case in CASES.values()
    for path in sorted(case.folder.glob("*.safetensors"))
    if path.stem != "weights"
]

# Many sizes to compile; `make parity` replays them.
LONG = {"tiled_image", "temporal_chunk17"}


def recorded(case: str, scenario: str) -> Scenario:
    """A scenario of the committed cases."""
    return next(s for s in scenarios(CASES[case]) if s.name == scenario)


def copied(case: str, folder: Path) -> Path:
    """A copy of a case that may be damaged."""
    return Path(shutil.copytree(CASES[case].folder, folder / case))


def compared(value: object, recorded: object, **how: object) -> Line:
    """The line of one answer to one recorded tensor."""
    scenario = Scenario("s", {}, {"out.x": np.asarray(recorded)})
    answer = Answer("out.x", value, 0.1, **how)
    (line,) = compare(Case("c", Path(), {}), scenario, [answer])
    return line


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "scenario"),
    [
        pytest.param(*one, marks=pytest.mark.slow) if one[1] in LONG else one
        for one in RECORDED
    ],
)
def test_every_recorded_result_is_answered_within_its_tolerance(case, scenario):
    lines = list(replay_scenario(CASES[case], recorded(case, scenario)))
    assert any(line.verdict == "ok" for line in lines)
    wrong = [
        str(line) for line in lines if line.verdict != "ok" and line.note != NO_WEIGHTS
    ]
    assert not wrong


@pytest.mark.parametrize(("case", "scenario"), RECORDED)
def test_every_scenario_is_of_exactly_one_kind(case, scenario):
    assert sum(kind.fits(recorded(case, scenario)) for kind in KINDS) == 1


@pytest.mark.parametrize(
    ("value", "recorded", "verdict"),
    [
        ([1.0, 2.05], [1.0, 2.0], "ok"),
        ([1.0, 2.2], [1.0, 2.0], "FAIL"),
        ([1.0, np.nan], [1.0, 2.0], "FAIL"),
        ([1.0, np.nan], [1.0, np.nan], "FAIL"),
        ([1.0, np.inf], [1.0, np.inf], "FAIL"),
        ([[1.0, 2.0]], [1.0, 2.0], "FAIL"),
    ],
)
def test_a_verdict_needs_equal_shapes_and_finite_close_values(value, recorded, verdict):
    assert compared(value, recorded).verdict == verdict


def test_a_relative_error_is_measured_against_the_largest_recorded_value():
    assert compared([95.0], [100.0], relative=True).error == pytest.approx(0.05)


def test_values_that_mean_nothing_are_left_out():
    where = np.array([True, False])
    assert compared([1.0, 5.0], [1.0, 2.0], where=where).verdict == "ok"
    assert compared([5.0, 1.0], [2.0, 1.0], where=where).verdict == "FAIL"


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ("out.frames_uint8", NO_WEIGHTS),
        ("out.x", "a scenario of an unknown kind"),
    ],
)
def test_what_is_not_computed_is_skipped_with_a_reason(tensor, why):
    scenario = Scenario("s", {}, {"in.x": np.zeros(1), tensor: np.zeros(1)})
    (line,) = replay_scenario(Case("c", Path(), {}), scenario)
    assert (line.tensor, line.verdict, line.note) == (tensor, "skipped", why)


def test_the_command_succeeds_on_recorded_values(tmp_path, capsys):
    copied("scheduler/two_stage_shift2", tmp_path)
    assert main(["--cases", str(tmp_path)]) == 0
    assert " 0 FAIL" in capsys.readouterr().out.splitlines()[-1]


def test_the_command_fails_on_one_wrong_value(tmp_path, capsys):
    file = copied("scheduler/two_stage_shift2", tmp_path) / "tables.safetensors"
    tensors = load_file(file)
    tensors["start_sigmas"][1] += 1e-4
    save_file(tensors, file)
    assert main(["--cases", str(tmp_path), "--only", "scheduler/*"]) == 1
    out = capsys.readouterr().out
    assert " 1 FAIL" in out.splitlines()[-1]
    failed = [line.split()[2] for line in out.splitlines()[:-1] if "FAIL" in line]
    assert failed == ["start_sigmas"]


def test_a_pattern_that_matches_no_case_is_an_error():
    with pytest.raises(ValueError, match="no case"):
        find(GOLDEN, "none*")
