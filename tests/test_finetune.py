# SPDX-License-Identifier: Apache-2.0
"""A run that trains adapters: what is trained, what is kept, and what it makes."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import lora
from launch.compile.machines import machine
from launch.compile.workload import Workload, workload
from launch.moving_shapes import write_dataset
from pyramid_jax import sharding
from pyramid_jax.checkpoint.adapters import read_adapters
from pyramid_jax.convert.convert import merge_model, save_changes
from pyramid_jax.finetune import base_weights, finetune
from pyramid_jax.model import model_config
from pyramid_jax.pipeline import folder, video
from pyramid_jax.pipeline.folder import TINY
from pyramid_jax.training.state import TrainState, abstract_state
from tests.test_configs import CONFIGS


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shapes", 16, seed=1)


def config(manifest: Path, steps: int = 2):
    """Adapters of the embedded model, and a short run."""
    cfg = lora.get_config("tiny")
    cfg.data.update(manifest=str(manifest), batch=8)
    cfg.lora.rank = 2
    cfg.optimizer.warmup_steps = 1
    cfg.loop.update(steps=steps, log_every=1, save_every=2, sample_every=2)
    cfg.prompts = cfg.prompts[:1]
    return cfg


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of two steps, on eight devices."""
    workdir = tmp_path_factory.mktemp("run")
    assert finetune(config(manifest), workdir, TINY) == workdir / "lora.safetensors"
    return workdir


def abstract(cfg: Any) -> tuple[Workload, TrainState]:
    """What trains adapters on a device, and the shapes of a run's state."""
    one = dataclasses.replace(machine("cpu"), devices=(jax.devices()[0],))
    work = workload(cfg, one)
    like = abstract_state(work.task.init, work.task.optimizer, work.mesh)
    return work, like._replace(frozen=work.frozen)


def state_bytes(state: TrainState) -> dict[str, int]:
    return {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part))
        for name, part in state._asdict().items()
    }


def test_only_adapters_have_an_average_and_moments():
    _, state = abstract(lora.get_config("smoke"))
    size, count = state_bytes(state), 4 * 2  # the optimizer's counters
    assert 0 < 5 * size["params"] < size["frozen"]
    assert size["ema"] == size["params"]
    assert size["optimizer"] == 2 * size["params"] + count
    assert set(state.averages()) == {"dit", "text", "lora"}


@pytest.mark.slow
def test_the_released_models_leave_room_on_a_gpu_of_24_gb():
    for name in ("mmdit_384p", "flux_384p"):
        size = state_bytes(abstract(lora.get_config(name))[1])
        assert size["frozen"] < 4.1e9 and sum(size.values()) < 4.5e9


@pytest.mark.slow
def test_the_gradient_is_that_of_adapters_alone(manifest: Path):
    work, state = abstract(config(manifest))
    loss = work.task.loss
    shape = jax.eval_shape(
        jax.grad(lambda p, *x: loss(state.frozen | p, *x)[0]),
        *(state.params, work.batch, jax.random.key(0), state.step),
    )
    assert jax.tree.structure(shape) == jax.tree.structure(state.params)


@pytest.mark.slow
def test_a_run_leaves_adapters_that_change_what_the_model_makes(run: Path):
    size = {"height": 32, "width": 32, "num_frames": 2, "seed": 0}
    files = {run / "lora.safetensors": 1.0}
    plain, changed = video.load(TINY), video.load(TINY, lora=files)
    assert changed.name == "tiny+lora:1"
    a, b = (x("a red circle moves left", **size).frames for x in (plain, changed))
    assert (a != b).any()
    assert list(run.glob("samples/0000002/0.mp4"))
    for name in ("lora.safetensors", "lora_comfyui.safetensors"):
        read = read_adapters(run / name)
        assert len(read) == 8 + 4 * 3 + 4
        assert all(np.abs(np.asarray(x)).max() > 0 for x in read.values())


@pytest.mark.slow
def test_merged_weights_are_those_of_the_model_with_adapters(run: Path, tmp_path: Path):
    files = {run / "lora.safetensors": 0.5}
    merge_model(TINY, files, tmp_path / "merged")
    found, expected = video.load(tmp_path / "merged"), video.load(TINY, lora=files)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.slow
def test_a_student_is_its_teacher_with_a_file_of_adapters(tmp_path: Path):
    teacher, rng = video.load(TINY), np.random.default_rng(0)
    change = jax.tree.map(lambda x: rng.normal(0, 0.01, x.shape), teacher.params["dit"])
    defaults = dataclasses.replace(teacher.defaults, video_steps=(1, 1, 1))
    cfg = dataclasses.replace(teacher.cfg, tokenizer=str(TINY / "tokenizer.json"))

    def saved(name: str, params: Any) -> Path:
        folder.save_model(tmp_path / name, cfg, defaults, params)
        return tmp_path / name

    dit = jax.tree.map(lambda x, y: np.float32(x + y), teacher.params["dit"], change)
    student, file = saved("student", teacher.params | {"dit": dit}), tmp_path / "x"
    save_changes(student, TINY, file)
    found = video.load(TINY, lora={file: 1.0})
    assert found.defaults.video_steps == (1, 1, 1)
    close = partial(np.testing.assert_allclose, rtol=0, atol=6e-3)
    jax.tree.map(close, found.params, video.load(student).params)
    merge_model(TINY, {file: 1.0}, tmp_path / "merged")
    assert video.load(tmp_path / "merged").defaults == found.defaults

    text = jax.tree.map(lambda x: x + 1, teacher.params["text"])
    other = saved("other", teacher.params | {"text": text})
    with pytest.raises(
        ValueError, match=r"differ in text/.* change the transformer al"
    ):
        save_changes(other, TINY, file)


@pytest.mark.slow
def test_a_continued_run_reads_its_base_again(run: Path, manifest: Path):
    assert not any("frozen" in str(path) for path in (run / "checkpoints").rglob("*"))
    finetune(config(manifest, steps=3), run, TINY)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.slow
def test_a_base_of_another_config_is_refused(manifest: Path):
    model = model_config(lora.get_config("smoke").model.to_dict())
    with pytest.raises(ValueError, match="is of another config than this run's"):
        base_weights(model, "float32", TINY, sharding.device_mesh())


def test_a_run_needs_a_base(manifest: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--start is missing; give the folder of the"):
        finetune(config(manifest), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_adapters(name: str):
    cfg = lora.get_config(name)
    assert cfg.lora.base == ("float32" if cfg.model.dit.width < 512 else "bfloat16")


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="there is no config 'nobody' of a model"):
        lora.get_config("nobody")
