# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run at toy size, and count what they say they count."""

import json
from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cpu_vs_reference
from benchmarks import vae as vae_benchmark
from benchmarks.reference import Original
from benchmarks.reference_vae import OriginalVAE
from benchmarks.timing import interleaved, ratios, spread
from benchmarks.workload import COLUMNS, Workload

TOY = Workload(
    depth=2, width=32, heads=2, cells=(8, 8), frames=3, caption=4, sampled=2, steps=1
)


@pytest.mark.slow  # compiles every stage of sampling
def test_the_command_writes_what_was_measured(tmp_path, capsys):
    path = tmp_path / "results" / "toy.json"
    sizes = {name: value for name, value in asdict(TOY).items() if name != "cells"}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    cells = ["--cells", *map(str, TOY.cells)]
    cpu_vs_reference.main([*arguments, *cells, "--repeats=1", f"--to={path}"])
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    assert result["workload"] == sizes | {"cells": list(TOY.cells)}
    assert {"commit", "cpu", "threads", "jax"} <= result["environment"].keys()
    for name in ("training step", "sampling"):
        both = result["comparisons"][name]
        assert both["jax"]["median"] > 0
        assert both["reference"] is None and both["ratio"] is None
        assert name in printed
    parts = result["breakdown"]
    assert min(parts[name] for name in ("dense", "attention", "floor", "rate")) > 0


@pytest.mark.slow  # compiles every way to encode and decode
def test_the_command_for_the_vae_writes_what_was_measured(tmp_path, capsys):
    path = tmp_path / "results" / "toy.json"
    sizes = {"height": 64, "width": 128, "frames": 9, "tile": 32}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    vae_benchmark.main([*arguments, "--repeats=1", f"--to={path}"])
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    assert sizes.items() <= result["workload"].items()
    measured = result["measured"]
    for name, one in measured.items():
        assert one["seconds"]["median"] > 0 and one["memory"] > 0
        assert one["reference"] is None and name in printed
    assert measured["decode, tiled"]["memory"] < measured["decode, whole"]["memory"]


def test_a_path_without_the_original_vae_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder video_vae"):
        OriginalVAE(tmp_path, vae_benchmark.Workload().cfg, 0, 256, 8)


def test_seconds_are_taken_in_turns():
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = interleaved(runs, repeats=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert sorted(seen[2:4]) == sorted(seen[4:6]) == ["a", "b"]


def test_a_ratio_compares_neighbours():
    times = {"slow": [2.0, 20.0, 4.0], "fast": [1.0, 10.0, 2.0]}
    assert ratios(times, over="slow", under="fast") == (2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.5, 2.5)


@pytest.mark.parametrize("variant", ["mmdit", "miniflux"])
def test_the_products_are_those_of_all_weights(variant):
    """Their sizes sum to the number of weights that are neither biases nor norms."""
    work = Workload(variant=variant, depth=3, width=64, heads=4)
    sizes = sum(p.inputs * p.outputs * n for p, n in work.products().items())
    assert 0.97 * work.parameters < sizes < work.parameters


def test_the_row_has_the_segments_of_the_original():
    """By hand: 2x2, 4x4 and 8x8 cells are 1, 4 and 16 tokens; of three frames, unit 1
    is trained at every stage, with the first frame as its history."""
    rows = TOY.rows
    lengths = np.bincount(rows.segment[0])
    np.testing.assert_array_equal(lengths, [2, 8, 8, 32])
    np.testing.assert_array_equal(rows.stage[0], COLUMNS)
    np.testing.assert_array_equal(
        np.bincount(rows.segment[0][rows.current[0]]), lengths // 2
    )
    # Text sees text and the first frame, the first frame the same, the last all.
    first = lengths // 2
    early = (4 + first) ** 2
    assert TOY.pairs == (early + first * (4 + lengths)).sum()


def test_a_path_without_the_original_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkout"):
        Original.load(tmp_path, TOY)


def test_the_inputs_fit_together():
    rows, text = TOY.rows, TOY.prompts
    assert rows.text.shape[:2] == rows.text_segment.shape
    assert text.features.shape[:2] == text.segment.shape == (2, 4)
    assert jnp.isfinite(TOY.videos).all()
