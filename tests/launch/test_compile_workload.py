# SPDX-License-Identifier: Apache-2.0
"""What `launch.compile --config` compiles for each kind of config."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import clean_history, lora, student, tiny, vae
from launch.compile.__main__ import main
from launch.compile.machines import GIB, Machine, machine
from launch.compile.plan import Compiled, compiled, plan, report
from launch.compile.workload import footage_shapes, workload, written
from launch.config_flag import ConfigParser, names
from launch.kinds import COMMANDS, kind
from launch.moving_shapes import write_dataset
from pyramid_jax import sharding
from pyramid_jax.objective import Losses
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.task import Task
from pyramid_jax.vae.clips import vae_batches
from pyramid_jax.vae.train import build_networks, vae_data
from tests.conftest import ROOT

KINDS = {"vae": vae, "teacher": student, "lora": lora, "model": tiny}
ROWS = 8


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def cpu() -> Machine:
    return machine("cpu")


@pytest.fixture(scope="module")
def clips_only() -> Any:
    """The smoke test of a VAE with one level, on clips without pictures."""
    cfg = vae.get_config("smoke")
    cfg.vae.update(spatial=(True,), temporal=(True,))
    for part in ("encoder", "decoder"):
        cfg.vae.update({f"{part}_widths": (4,), f"{part}_layers": (0,)})
    cfg.discriminator.layers = 1
    cfg.data.update(images=0, height=16, width=16, frames=3, batch=ROWS)
    return cfg


@pytest.fixture(scope="module")
def step_of_vae(clips_only: Any, cpu: Machine) -> Compiled:
    return compiled(clips_only, cpu)


@pytest.mark.slow  # compiles both networks and their gradients
def test_the_step_of_a_vae_holds_both_networks(step_of_vae: Compiled):
    """Weights, their average, and two moments of each."""
    weights = step_of_vae.work.task.init(jax.random.key(0))
    assert set(weights) == {"vae", "discriminator"}
    clips = step_of_vae.work.batch.video
    own = count(clips) // 8  # bytes, of eight devices
    state = 4 * 4 * count(sharding.unbox(weights))
    # What remains are counts of steps, and the key.
    assert 0 < step_of_vae.memory["arguments"] - state - own < 128
    made = plan("mine", step_of_vae, machine("cpu"))
    assert made.rows == ROWS and made.fits
    assert made.flops["needed"] == pytest.approx(made.flops["products"], rel=0.05)
    assert "mine on cpu: 8 devices, data 8, 8 rows" in report(made)


def test_the_batch_of_a_vae_is_what_training_reads(tmp_path: Path):
    cfg = vae.get_config("smoke")
    cfg.data.update(manifest=str(write_dataset(tmp_path / "shapes", 12, seed=1)))
    data = vae_data(cfg, build_networks(cfg))
    read, shapes = next(vae_batches(data, tmp_path)), footage_shapes(data)
    assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, shapes)
    assert {x.dtype for x in jax.tree.leaves((read, shapes))} == {np.dtype(np.uint8)}


def products_task() -> Task:
    """Two matrices, the first of which is applied in a loop of three turns."""

    def loss(params: Any, x: jax.Array, key: jax.Array, step: jax.Array) -> Any:
        def turn(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ params["first"]), None

        value = jax.lax.scan(turn, x, None, length=3)[0] @ params["second"]
        return jnp.where(step > 0, 2, 1) * value.sum(), Losses(*[value.sum()] * 3)

    rates = OptimizerConfig()
    shapes = {"first": jnp.zeros((16, 16)), "second": jnp.zeros((16, 8))}
    return Task(lambda key: shapes, loss, optimizer(rates), learning_rate(rates))


def test_what_a_model_needs_is_counted_as_it_is_written():
    """Three products of a forward pass, and one for the weights and one for the input
    of each in the backward pass, where an input has a gradient."""
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    turn, last = 2 * 4 * 16 * 16, 2 * 4 * 16 * 8
    found = written(products_task(), x, "cpu")
    # The loop is not told that the gradient of its first input is for nothing.
    assert found == 3 * 3 * turn + 3 * last


def test_a_student_needs_its_teacher_walk_and_adapters_half_a_backward_pass(
    cpu: Machine,
):
    names = ("teacher", "lora", "model")
    of = {name: workload(KINDS[name].get_config("smoke"), cpu) for name in names}
    steps = student.get_config("smoke").teacher.steps
    whole = of["model"].needed()
    assert of["teacher"].needed() == pytest.approx((1 + 2 * steps / 3) * whole)
    assert 2 / 3 * whole < of["lora"].needed() < whole
    # The base is there, but is not among what is trained.
    trained = of["lora"].task.init(jax.random.key(0))
    assert count(sharding.unbox(trained)) < 0.5 * count(of["lora"].frozen)


@pytest.mark.parametrize("name", ["plan_vae", "plan_vae_long"])
def test_the_head_of_a_config_says_what_was_predicted(name: str):
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    found, head = json.loads(file.read_text(encoding="utf-8")), vae.__doc__ or ""
    assert f"{found['memory']['total'] / GIB:.0f} GiB and" in " ".join(head.split())
    assert f"{found['seconds']['step']:.1f} s" in head


def test_every_config_is_compiled_for_its_machine():
    """By `make compile-configs`, whose results are what docs/sharding.md shows."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (listed,) = re.findall(r"^CONFIGS \?= (.*)$", makefile, re.MULTILINE)
    assert {*names()} <= {*listed.split()}
    for name in listed.split():
        file = f"plan_{name.replace(':', '_')}.json"
        found = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        assert found["config"] == name
        assert found["machine"] == ConfigParser("config").parse(name).machine


def test_the_sections_say_what_is_trained():
    for name, config in KINDS.items():
        assert kind(config.get_config("smoke")) == name
    assert kind(clean_history.get_config("smoke")) == "model"
    assert list(KINDS) == list(COMMANDS)


def test_what_can_not_be_compiled_is_said_in_one_line(tmp_path: Path, cpu: Machine):
    file = tmp_path / "other.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        "    return ConfigDict({'machine': 'cpu', 'mesh': {}, 'network': {}})\n"
    )
    with pytest.raises(SystemExit, match="has none of the sections vae, teacher"):
        main([f"--config={file}"])
    cfg = vae.get_config("smoke")
    cfg.data.images = 12
    with pytest.raises(ValueError, match="batch of 12 rows can't be divided over 8"):
        workload(cfg, cpu)


@pytest.mark.slow  # each compiles a training step
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_compiles(name: str, cpu: Machine):
    made = plan(name, compiled(KINDS[name].get_config("smoke"), cpu), cpu)
    assert made.fits and 0 < made.flops["needed"] <= 1.05 * made.flops["products"]
