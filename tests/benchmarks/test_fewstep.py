# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import numpy as np
import pytest

import pyramid_jax
from benchmarks import fewstep
from benchmarks.fewstep import UNGUIDED, Point, evaluations, few, plot, row
from pyramid_jax.model import SampleConfig


def point(name: str, right: list[bool]) -> Point:
    return Point(name, 3, 0.5, np.array(right), 0.1)


def test_a_second_branch_and_every_step_count():
    sample = SampleConfig(video_steps=(5, 5, 5))
    assert evaluations(sample) == 30
    assert evaluations(replace(sample, last_step=False)) == 24
    assert evaluations(few(sample, 2)) == 12
    assert evaluations(few(replace(sample, guidance=UNGUIDED), 1)) == 3


def test_what_is_kept_is_a_share_of_what_the_teacher_gets_right():
    teacher = point("teacher", [True] * 8 + [False] * 2)
    student = point("student", [True] * 6 + [False] * 4)
    kept = student.kept(teacher)
    assert kept.value == 0.75 and kept.low < 0.75 < kept.high
    same = teacher.kept(teacher)
    assert same == (1.0, 1.0, 1.0)


def test_the_plot_has_a_curve_for_each_model():
    teacher = point("teacher, its own steps", [True, False])
    rows = [row(p, teacher) for p in (teacher, point("student, 1", [True, True]))]
    made = {"commit": "c", "date": "d", "device": "cpu"}
    figure = plot({"environment": made, "captions": 2, "points": rows})
    assert [len(axes.containers) for axes in figure.axes] == [2, 2]


@pytest.mark.slow  # samples at six numbers of steps
def test_teacher_and_student_are_sampled_from_the_same_noise(tmp_path, capsys):
    model, path = str(pyramid_jax.TINY), tmp_path / "fewstep.json"
    plot = tmp_path / "fewstep.png"
    fewstep.main(
        [
            f"--teacher={model}",
            f"--student={model}",
            "--judge=shapes",
            "--captions=2",
            f"--to={path}",
            f"--plot={plot}",
        ]
    )
    found = json.loads(path.read_text())["points"]
    assert [p["evaluations"] for p in found] == [24, 24, 12, 6, 6, 3]
    assert found[0]["distance"] == 0 < found[1]["distance"]
    assert "| teacher, its own steps | 24 |" in capsys.readouterr().out
    assert plot.exists()
