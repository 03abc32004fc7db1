# SPDX-License-Identifier: Apache-2.0
"""A student's run from a config, mp4 files and a teacher's folder."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from configs import student
from launch.moving_shapes import write_dataset
from pyramid_jax import sharding
from pyramid_jax.data.loader import batches
from pyramid_jax.distill import (
    Caption,
    Distillation,
    distill,
    distillation_loss,
    negative_caption,
    negative_text,
    teacher_weights,
)
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import ModelConfig, initialise, model_config, sample_config
from pyramid_jax.pipeline import folder, video
from pyramid_jax.reflow import ReflowConfig
from pyramid_jax.train import experiment
from tests.test_configs import CONFIGS
from tests.test_objective import ROWS


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shapes", 16, seed=1)


def config(manifest: Path):
    cfg = student.get_config("smoke")
    cfg.data.update(manifest=str(manifest), batch=8)
    return cfg


@pytest.fixture(scope="module")
def teacher(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights, head and modulations included."""
    cfg, path = config(manifest), tmp_path_factory.mktemp("teacher")
    model = model_config(cfg.model.to_dict())
    init = jax.jit(partial(initialise, model))
    weights = sharding.unbox(init(jax.random.key(0)))
    random = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: np.float32(x + 0.05 * random.normal(size=x.shape)), weights
    )
    folder.save_model(path, model, sample_config(cfg.sample.to_dict()), weights, None)
    return path


@pytest.fixture(scope="module")
def run(
    manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The work directory of a finished run of two steps, on eight devices."""
    workdir = tmp_path_factory.mktemp("run")
    distill(config(manifest), workdir, teacher)
    return workdir


@pytest.mark.slow
def test_a_student_differs_from_its_teacher_and_reads_as_it_does(
    run: Path, teacher: Path
):
    made, given = (video.load(path).params for path in (run / "model", teacher))
    assert set(made) == {"dit", "text"}
    jax.tree.map(np.testing.assert_array_equal, made["text"], given["text"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), made["dit"], given["dit"])
    assert any(jax.tree.leaves(changed))


@pytest.mark.slow
def test_a_student_samples_with_one_evaluation_per_stage(run: Path):
    model, steps = video.load(run / "model"), []
    video_of = model(
        "a red circle moves left",
        num_frames=2,
        height=32,
        width=32,
        seed=0,
        callback_on_step_end=steps.append,
    )
    assert video_of.frames.shape == (1, 2, 32, 32, 3)
    assert len(steps) == 2 * len(model.cfg.stages)


@pytest.mark.slow
def test_a_run_goes_on_without_its_teacher(run: Path, manifest: Path):
    cfg = config(manifest)
    cfg.loop.update(steps=3)
    distill(cfg, run)
    assert (run / "checkpoints/3").is_dir()


@pytest.mark.slow
def test_muon_leaves_the_teacher_alone_too(
    manifest: Path, teacher: Path, tmp_path: Path
):
    cfg = config(manifest)
    cfg.optimizer.kind = "muon"
    made, given = (
        video.load(path).params for path in (distill(cfg, tmp_path, teacher), teacher)
    )
    jax.tree.map(np.testing.assert_array_equal, made["text"], given["text"])


def test_the_loss_moves_the_student_and_stops_at_its_teacher(
    manifest: Path, teacher: Path, tmp_path: Path
):
    cfg = config(manifest)
    cfg.data.batch = 1
    cfg.data.tokens, cfg.teacher.steps = 400, 2
    described = experiment(cfg)
    model, reflow = described.model, ReflowConfig(2, Guidance(3.0, 2.0))
    task = Distillation(model, reflow, negative_caption(described))
    rows = next(batches(described.data, described.tokenize, tmp_path))
    params = teacher_weights(model, teacher)
    step = jax.jit(jax.value_and_grad(partial(distillation_loss, task), has_aux=True))
    (value, losses), gradient = step(params, rows, jax.random.key(0))
    assert 0 < float(value) < np.inf and float(losses.weight) > 0
    norms = {name: float(optax.tree.norm(tree)) for name, tree in gradient.items()}
    assert norms["dit"] > 0 and norms["teacher"] == 0


@pytest.mark.slow
def test_a_new_run_needs_a_teacher(manifest: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--start is missing; give the folder of the"):
        distill(config(manifest), tmp_path)


def test_stored_features_serve_as_negative_captions(teacher: Path):
    model = video.load(teacher).cfg
    stored = ModelConfig(model.dit, model.layout, model.latent)
    tokens = np.arange(6, dtype=np.float32).reshape(3, 2)
    text = negative_text(stored, {}, ROWS.stage, Caption(tokens, tokens[:1]))
    expected = [[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, -1, -1, -1]]
    np.testing.assert_array_equal(text.segment, expected)
    np.testing.assert_array_equal(text.features, np.tile(tokens, (2, 3, 1)))
    np.testing.assert_array_equal(text.pooled, np.tile(tokens[:1], (2, 3, 1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_student(name: str):
    cfg = student.get_config(name)
    stages = len(cfg.model.edges) - 1
    assert cfg.sample.first_steps == (2,) * stages
    assert cfg.teacher.guidance.first > 0 == cfg.sample.guidance.first


def test_an_unknown_teacher_is_refused():
    with pytest.raises(ValueError, match="there is no config 'nobody' of a model"):
        student.get_config("nobody")
