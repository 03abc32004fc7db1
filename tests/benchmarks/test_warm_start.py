# SPDX-License-Identifier: Apache-2.0
"""The benchmark of warm starts: what a process does, and that programs save time."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import warm_start
from benchmarks.warm_start import Split, first_step, named_case, restored, stored
from pyramid_jax.checkpoint import files


def test_a_process_ends_with_its_first_step():
    steps = []

    class Model:
        def run(self, request: str, callback_on_step_end: Any):
            for step in range(3):
                steps.append((request, step))
                callback_on_step_end(step)

    class Sampled:
        def request(self, model: Model, prompt: str) -> str:
            return prompt

    model: Any = Model()
    sampled: Any = Sampled()
    first_step(model, sampled)
    assert steps == [("a prompt", 0)]


def test_the_parts_of_a_process_are_its_time():
    assert Split(1.0, 2.0, 4.0, 8.0).total == 15.0


@pytest.mark.slow
def test_a_process_reads_the_weights_that_were_written(tmp_path: Path):
    of = named_case("shallow")
    size = warm_start.write_case(of, tmp_path)
    read = files.read_weights(tmp_path, stored(of.weights), lambda _, x: x)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), of.weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), restored(read)) == expected
    assert size == sum(x.nbytes for x in jax.tree.leaves(read))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(read))


@pytest.mark.slow  # four processes
def test_kept_programs_save_what_jax_repeats(tmp_path: Path, capsys):
    path = tmp_path / "results" / "warm.json"
    warm_start.main(["--cases", "shallow", "--repeats=1", f"--to={path}"])
    result = json.loads(path.read_text())
    assert {"commit", "cpu", "jax", "device"} <= result["environment"].keys()
    modes = result["cases"]["shallow"]["modes"]
    cold, jaxs, kept = (modes[x]["programs"]["median"] for x in ("cold", "jax", "kept"))
    assert kept < jaxs < cold
    assert "kept programs" in capsys.readouterr().out
