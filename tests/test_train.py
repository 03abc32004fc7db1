# SPDX-License-Identifier: Apache-2.0
"""A whole training run from a config and mp4 files, continued, and sampled."""

import dataclasses
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import tiny
from launch.moving_shapes import write_dataset
from pyramid_jax.model import model_config
from pyramid_jax.objective import Losses
from pyramid_jax.pipeline import video as generate
from pyramid_jax.shapes import Rows
from pyramid_jax.sharding import device_mesh
from pyramid_jax.train import experiment, start_weights, train, validator
from pyramid_jax.training.run import with_weights
from pyramid_jax.training.state import TrainState


def config(manifest: Path) -> ConfigDict:
    cfg = tiny.get_config("smoke")
    cfg.data.update(manifest=str(manifest), batch=8)
    cfg.data.held_out = 4
    cfg.loop.sample_every = 2
    cfg.prompts = ("a red circle moves left",)
    return cfg


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shapes", 16, seed=1)


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of two steps on eight devices."""
    workdir = tmp_path_factory.mktemp("run")
    train(config(manifest), workdir)
    return workdir


def test_a_run_leaves_loss_samples_checkpoints_and_a_model(run: Path):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    expected = {
        "loss",
        "loss_stage_0",
        "loss_stage_2",
        "gradient_norm",
        "learning_rate",
        "validation_loss",
        "validation_loss_stage_0",
        "model_tflops_per_second",
        "imbalance",
    }
    assert expected <= set(lines[-1])
    assert "utilisation" not in lines[-1]  # nobody knows the peak of a CPU
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "loss.png").stat().st_size > 1000
    assert (run / "samples/0000002/0.mp4").stat().st_size > 0
    assert (run / "samples/0000002/contact_sheet.png").stat().st_size > 1000
    assert (run / "checkpoints/2").is_dir()
    (start,) = [json.loads(x) for x in (run / "starts.jsonl").read_text().splitlines()]
    assert start["config"]["data"]["held_out"] == 4 and start["step"] == 0
    assert {"python", "jax", "optax"} <= set(start["versions"])
    assert start["command"] and re.fullmatch(
        r"[\da-f]{40}\+?", start["commit"] or "0" * 40
    )


@pytest.mark.slow
def test_the_trained_model_makes_videos(run: Path):
    model = generate.load(run / "model")
    video = model("a red circle moves left", height=32, width=32, num_frames=3)
    assert video.frames.shape == (1, 3, 32, 32, 3)


@pytest.mark.slow
def test_a_run_is_continued_to_more_steps(run: Path, manifest: Path):
    cfg = config(manifest)
    cfg.loop.update(steps=3, sample_every=0)
    train(cfg, run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_the_held_out_loss_has_the_same_rows_and_noise_every_time(
    run: Path, manifest: Path
):
    def loss(_: Any, rows: Rows, key: jax.Array) -> tuple[jax.Array, Losses]:
        noise = jax.random.normal(key, (3,))
        sums = noise * rows.clean.sum() + rows.text.sum(dtype=jnp.float32)
        return sums.sum(), Losses(sums.sum(), sums, jnp.float32([1, 0, 1]))

    described = experiment(config(manifest))
    data, words = described.data, described.tokenize
    params = jax.device_put(jnp.zeros(1), NamedSharding(device_mesh(), P()))
    validate, again = (validator(run, data, words, loss) for _ in range(2))
    assert validate is not None and again is not None
    values = validate(1, params)
    assert set(values) == {"validation_loss"} | {
        f"validation_loss_stage_{stage}" for stage in (0, 2)
    }
    assert values == validate(2, params) == again(3, params)
    assert validator(run, replace(data, held_out=0), words, loss) is None


def test_a_run_of_another_config_is_not_continued(run: Path, manifest: Path):
    cfg = config(manifest)
    cfg.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"of another config: optimizer.learning_rate"):
        train(cfg, run)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32 + 1])
def test_seeds_that_would_share_weights_are_refused(
    seed: int, manifest: Path, tmp_path: Path
):
    cfg = config(manifest)
    cfg.seed = seed
    with pytest.raises(ValueError, match="must be a whole number of 0 to 2147483647"):
        train(cfg, tmp_path)


def test_a_run_that_ends_within_its_warm_up_says_so(
    run: Path, manifest: Path, caplog: pytest.LogCaptureFixture
):
    cfg = config(manifest)
    cfg.optimizer.warmup_steps = 9
    with pytest.raises(ValueError, match="another config"):  # before a step is made
        train(cfg, run)
    assert "ends after 2 steps (loop.steps), within its warm-up of 9" in caplog.text


def test_a_new_run_can_start_from_the_weights_of_a_model(run: Path, manifest: Path):
    cfg = config(manifest)
    model = model_config(cfg.model.to_dict())
    weights = generate.load(run / "model").params
    count, empty = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, weights)
    zeros = TrainState(count, count, empty, empty, None)
    new = with_weights(zeros, start_weights(model, run / "model"))
    for tree in (new.params, new.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, weights)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    widened = with_weights(zeros, half).params
    assert {x.dtype.name for x in jax.tree.leaves(widened)} == {"float32"}

    for reading in ({"clean_history": True}, {"causal": False}):
        dit = dataclasses.replace(model.dit, **reading)
        other = dataclasses.replace(model, dit=dit)
        tuned = start_weights(other, run / "model", tuned=True)
        jax.tree.map(np.testing.assert_array_equal, tuned, weights)
        with pytest.raises(ValueError, match=r"is of another config than this run's"):
            start_weights(other, run / "model")
    cfg.model.dit.single_blocks = 2
    with pytest.raises(ValueError, match=r"is of another config than this run's"):
        start_weights(model_config(cfg.model.to_dict()), run / "model")


@pytest.mark.slow  # three runs
@pytest.mark.parametrize("variant", ["flux", "mmdit"])
def test_each_stage_of_the_paper_begins_where_the_one_before_ended(
    variant: str, manifest: Path, tmp_path: Path
):
    before = None
    for size in ("image", "384p", "768p"):
        name = f"{variant}_{size}"
        module = importlib.import_module(f"configs.{name}")
        cfg = module.get_config("smoke")
        cfg.data.manifest, cfg.prompts = str(manifest), ()
        model = train(cfg, tmp_path / name, before)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("loss") for line in lines]
        assert losses and all(np.isfinite(loss) for loss in losses)
        if before is not None:
            old, new = (generate.load(folder).params for folder in (before, model))
            moved = [
                np.abs(a - b).max()
                for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)
            ]
            # Two small steps away from it, and not a beginning of its own.
            assert 0 < max(moved) < 0.01
        before = model


def test_an_empty_manifest_is_refused(tmp_path: Path):
    empty = tmp_path / "manifest.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="is empty; write lines such as"):
        train(config(empty), tmp_path / "run")
