# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training steps: what it says of a small run of real clips."""

from pathlib import Path

import pytest

from benchmarks import train_step
from configs import tiny
from launch.moving_shapes import write_dataset


@pytest.mark.slow
def test_steps_and_data_are_timed(tmp_path: Path):
    cfg = tiny.get_config("smoke")
    cfg.data.update(manifest=str(write_dataset(tmp_path / "shapes", 12, seed=0)))
    found = train_step.steps(cfg, tmp_path / "run", count=10)
    found |= train_step.data(cfg, tmp_path, count=10)
    on_cpu = {*train_step.UNITS} - {"utilisation", "device_gib"}
    assert found.keys() == on_cpu
    assert len(found["seconds"]) == 10 / train_step.WINDOW
    assert all(x > 0 for name in on_cpu - {"data_wait"} for x in found[name])
    frames = cfg.data.frames * found["examples"][0]
    assert found["frames"] == [pytest.approx(frames)]


def test_the_table_says_what_and_on_what():
    found = {"rows": {"median": 2.0, "low": 1.0, "high": 3.0}}
    where = {"devices": 1, "device": "cpu", "threads": 2}
    shown = train_step.step_table(where | {"found": found})
    assert shown.splitlines()[0] == "| 1 x cpu, 2 threads | median | quartiles |"
    assert shown.splitlines()[2] == f"| {train_step.UNITS['rows']} | 2 | 1 to 3 |"
