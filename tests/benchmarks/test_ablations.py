# SPDX-License-Identifier: Apache-2.0
"""The ablations: what is counted, measured and drawn, and a small run of all of it."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.ablations import __main__ as program
from benchmarks.ablations import arms, costs, measures, plan, released, report, scenes
from benchmarks.ablations.arms import Run
from benchmarks.ablations.measures import MEASURES, Gap, Interval
from configs import ablations
from pyramid_jax import model as models
from pyramid_jax import pyramid, sharding
from pyramid_jax.layout import FULL, NONE, PYRAMID
from pyramid_jax.shapes import Rows
from tests.house.sources import ROOT

SMOKE = plan.SCALES["smoke"]


# -------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("video", "history", "tokens", "tflop"),
    [
        ("384p, 5 s", PYRAMID, 2_940, 4.905),
        ("384p, 5 s", FULL, 15_360, 38.54),
        ("384p, 5 s", NONE, 15_360, 56.42),
        ("768p, 10 s", PYRAMID, 15_360, 40.14),
        ("768p, 10 s", FULL, 119_040, 1195.6),
        ("768p, 10 s", NONE, 119_040, 2256.0),
    ],
)
def test_tokens_and_flop_of_the_longest_step(video, history, tokens, tflop):
    cost = released.history_cost(video, history)
    assert cost.tokens == tokens
    assert cost.step / 1e12 == pytest.approx(tflop, rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    scenes.write_scenes(folder / "data", SMOKE.scenes)
    return folder


def config(folder: Path, arm: str):
    return arms.arm_config(Run(folder, arm, 0, SMOKE))


@pytest.mark.slow  # draws scenes and packs rows of four arms
@pytest.mark.parametrize(
    "pair",
    [("images_1_stage", "images_3_stages"), ("pyramid", "sequences")],
    ids=["images", "videos"],
)
def test_arms_take_about_the_same_arithmetic_per_step(
    pair: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """And the same in all, but for a step."""
    budget = 1e13
    monkeypatch.setattr(costs, "COUNTED", 4)
    found = [costs.mean_cost(config(folder, arm), folder) for arm in pair]
    flops = [cost.flop for cost in found]
    assert max(flops) / min(flops) < 1.3
    for cost in found:
        steps = costs.steps_of(budget, cost)
        assert abs(steps * cost.flop - budget) <= cost.flop / 2


def row(frames: int, padding: int) -> Rows:
    """One segment of a frame of 4 tokens each, and two words."""
    n = 4 * frames + padding
    there = np.arange(n) < 4 * frames
    order = np.where(there, np.arange(n) // 4, 0).astype(np.int32)[None]
    segment = np.where(there, 0, -1).astype(np.int32)[None]
    values = np.zeros((1, n, 48), np.float32)
    words = np.array([[0, 0, -1]], np.int32)
    text = np.zeros_like(words)
    stage = np.zeros((1, 1), np.int32)
    places, pooled = np.zeros((1, n, 3), np.float32), np.zeros((1, 1, 0), np.float32)
    current = there[None]
    fields = (values, values, places, segment, order, current, stage)
    return Rows(*fields, text, words, pooled)


def test_padding_costs_nothing_and_hidden_pairs_cost_nothing(folder: Path):
    def cost(arm: str, frames: int, padding: int = 0) -> float:
        model = models.model_config(config(folder, arm).model.to_dict())
        init = partial(models.initialise, model)
        weights = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
        return costs.rows_cost(model, weights, row(frames, padding)).flop

    assert cost("pyramid", 3) == cost("pyramid", 3, padding=9)
    # 14 tokens in frames of 6, 4 and 4: 6 x 8 + 4 x 4 of the 196 pairs look ahead.
    more = cost("bidirectional", 3) - cost("pyramid", 3)
    model = config(folder, "pyramid").model.dit
    blocks = model.double_blocks + model.single_blocks
    assert more == 3 * 4 * blocks * 64 * model.width


# ----------------------------------------------------------------------------- measures


def test_blocks_are_seen():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (3, 16, 16, 3)).astype(np.float32)
    fine = rng.integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)
    assert measures.blockiness(pyramid.up(small).astype(np.uint8)) > 1000
    assert measures.blockiness(fine) == pytest.approx(1, abs=0.05)


def test_real_clips_are_right_and_have_no_blocks():
    asked = scenes.asked(6, 3, "video")
    kept = measures.measured([each.real for each in asked], asked)
    assert kept["colours"].all() and kept["motions"].mean() >= 0.8
    assert 0.9 < kept["blockiness"].mean() < 1.1
    images = measures.measured([each.real[-1:] for each in asked], asked)
    np.testing.assert_allclose(kept["last"], images["features"], atol=1e-4)


def test_clips_whose_objects_change_are_not_steady():
    clips = [each.real for each in scenes.asked(5, 3, "video")]
    mixed = np.stack([clip[0] for clip in clips])
    real = [measures.steadiness(clip) for clip in scenes.enlarged(clips)]
    (steady,) = (measures.steadiness(clip) for clip in scenes.enlarged([mixed]))
    assert np.mean(real) > 0.6 and steady < 0.3
    assert measures.steadiness(scenes.enlarged([clips[0][[0] * 5]])[0]) == 1


def test_a_gap_is_that_of_pairs():
    """Where both arms have the same clips but for a constant, it has no spread."""
    rng = np.random.default_rng(0)
    one = {"steady": rng.normal(size=50)}
    other = {"steady": one["steady"] + 0.5}
    gap = measures.paired_gap(MEASURES["steady"], (one, other), {}, 30)
    assert measures.mean_gap([gap]) == pytest.approx((0.5, 0.5, 0.5))
    noisy = {"steady": rng.normal(size=50)}
    low, high = measures.mean_gap(
        [measures.paired_gap(MEASURES["steady"], (one, noisy), {}, 500)]
    )[1:]
    expected = 2 * 1.96 * np.std(noisy["steady"] - one["steady"]) / 50**0.5
    assert high - low == pytest.approx(expected, rel=0.2)


def test_seeds_narrow_the_interval():
    rng = np.random.default_rng(0)
    gaps = [Gap(1.0, rng.normal(1.0, 0.2, 4000)) for _ in range(4)]
    widths = [np.ptp(measures.mean_gap(some)[1:]) for some in (gaps[:1], gaps)]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.1)


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("frechet", 0.1, 0.3, "agrees"),  # the other arm is farther from real clips
        ("frechet", -0.3, -0.1, "disagrees"),
        ("frechet", -0.1, 0.3, "undecided"),
        ("steady", 0.1, 0.3, "disagrees"),  # the other arm is steadier
        ("steady", -0.3, -0.1, "agrees"),
    ],
)
def test_the_interval_alone_decides(name, low, high, expected):
    gap = Interval((low + high) / 2, low, high)
    assert measures.verdict(MEASURES[name], gap) == expected


# --------------------------------------------------------------------------- whole runs


def test_every_question_has_its_arms_and_its_measure():
    for question in plan.QUESTIONS.values():
        assert {question.baseline, *question.others} <= set(ablations.ARMS)
        assert question.measure in MEASURES
        assert (
            len({plan.is_image(a) for a in (question.baseline, *question.others)}) == 1
        )
    assert set(ablations.ARMS) - set(plan.arms()) == {"plain"}


def test_nothing_that_was_not_run_is_told():
    told = report.answers_table({})
    questions = plan.QUESTIONS.values()
    assert told.count(report.NOT_RUN) == sum(len(q.others) for q in questions)
    assert report.NOT_RUN in report.runs_table({})
    assert report.NOT_RUN in report.renoising_table({})


def run(folder: Path, *arguments: str) -> dict:
    """What a small run of the command finds, on one device."""
    flags = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    cache = str(ROOT / ".cache" / "tests")
    command = ["-m", "benchmarks.ablations", "--scale=smoke", f"--to={folder}"]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ablations.json").read_text())


@pytest.mark.slow
def test_a_small_run_of_a_question_makes_its_tables_and_figures(tmp_path: Path):
    found = run(tmp_path, "--only", "spatial")
    assert set(found["runs"]) == {"images_1_stage-0", "images_3_stages-0"}
    for record in found["runs"].values():
        assert {"seed", "commit", "device", "jax", "steps", "flop"} <= set(record)
        assert [point["step"] for point in record["points"]] == [
            record["steps"] // 2,
            record["steps"],
        ]
        assert np.isfinite(record["points"][-1]["measures"]["frechet"])
    answer = found["answers"]["spatial"]["images_1_stage"]
    assert f"| {answer['verdict']} |" in report.answers_table(found)
    assert report.runs_table(found).count("seed 0") == 2
    assert (tmp_path / "figures" / "ablations_images.png").stat().st_size > 10_000


def test_arms_of_videos_begin_with_the_images_of_their_seed(tmp_path: Path):
    names = [run.name for run in program.runs(tmp_path, SMOKE, ["causal"])]
    assert names == ["images_3_stages-0", "pyramid-0", "bidirectional-0"]
    images, pyramid, _ = program.runs(tmp_path, SMOKE, ["causal"])
    assert images.start is None
    assert pyramid.start == images.model == tmp_path / "images_3_stages-0" / "model"


def test_what_is_finished_is_not_done_again(tmp_path: Path):
    done = Run(tmp_path, "images_1_stage", 0, SMOKE)
    done.record.write_text('{"finished": true, "steps": 7}')
    assert arms.run_arm(done)["steps"] == 7


@pytest.mark.slow
def test_a_small_run_of_everything(tmp_path: Path):
    found = run(tmp_path)
    assert len(found["runs"]) == len(plan.arms())
    assert set(found["renoising"]) == {"textured", *program.renoising.EMBEDDED}
    assert report.NOT_RUN not in report.answers_table(found)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 4


def test_folders_of_another_scale_and_publishing_of_smoke_are_refused(tmp_path: Path):
    program.check_folder(tmp_path, "full")
    with pytest.raises(ValueError, match="rows for one device, there are 8; show one"):
        program.main(["--scale=full", f"--to={tmp_path}"])
    with pytest.raises(ValueError, match="holds runs of scale 'full', not 'smoke'"):
        program.main(["--scale=smoke", f"--to={tmp_path}"])
    with pytest.raises(ValueError, match="needs a scale that measures something"):
        program.main(["--scale=smoke", f"--to={tmp_path}", "--publish"])
