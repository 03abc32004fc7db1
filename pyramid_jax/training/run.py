# SPDX-License-Identifier: Apache-2.0
"""A training run of any model: state, steps, checkpoints and metrics in a folder."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import optax

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.config import build
from pyramid_jax.training import loop, state
from pyramid_jax.training.loop import LoopConfig, Outputs, Sample
from pyramid_jax.training.metrics import Metrics, plot_loss
from pyramid_jax.training.state import Init, TrainState
from pyramid_jax.training.step import LossOfStep, StepConfig, train_step

# Sections that may differ when a run is continued.
FREE = {"loop", "mesh", "sample", "prompts"}


class Task(NamedTuple):
    """What a run trains.

    `rate` is the learning rate for the metrics; `prepare` changes a new state, which a
    continued run has no use for; `sample` is also called at the end.
    """

    init: Init
    loss: LossOfStep
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    batches: grain.DatasetIterator[Any]
    sample: Sample
    prepare: Callable[[TrainState], TrainState] = lambda new: new


def run(cfg: Any, workdir: str | Path, task: Task) -> TrainState:
    """Trains as the sections step, mesh, loop and seed of a config say; the last state.

    The folder gets checkpoints/, metrics.jsonl, TensorBoard files and loss.png. A run
    that the folder already holds is continued. The batches are closed.

    Raises:
        ValueError: a section is wrong, or the folder is of another config.
    """
    workdir, key = Path(workdir), jax.random.key(cfg.seed)
    mesh = sharding.device_mesh(**cfg.mesh.to_dict())
    like = state.abstract(task.init, task.optimizer, mesh)
    step_cfg = build(StepConfig, cfg.step.to_dict())
    step = train_step(task.loss, task.optimizer, task.rate, step_cfg, like)

    def fresh() -> TrainState:
        return task.prepare(state.create(key, task.init, task.optimizer, mesh))

    kept = {k: v for k, v in cfg.to_dict().items() if k not in FREE}
    loops = build(LoopConfig, cfg.loop.to_dict())
    with Store(workdir / "checkpoints", kept) as store, Metrics(workdir) as metrics:
        last = loop.run(
            loops,
            step,
            loop.resume(store, like, task.batches, fresh),
            task.batches,
            jax.random.fold_in(key, 1),
            Outputs(store, metrics, task.sample),
        )
        task.batches.close()
        sampled = loops.sample_every and int(last.step) % loops.sample_every == 0
        if not sampled and (values := task.sample(int(last.step), last.ema)):
            metrics.write(int(last.step), values)
            logging.info("after %d steps: %s", last.step, values)
    if jax.process_index() == 0:
        plot_loss(workdir / "metrics.jsonl", workdir / "loss.png")
    return last


def with_weights(new: TrainState, weights: Mapping[str, Any]) -> TrainState:
    """The state with the given entries of the weights instead of its fresh ones.

    Their average is a copy of them.
    """
    there = {name: new.params[name] for name in weights}
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), dict(weights), there
    )
    copied = jax.tree.map(lambda x: jnp.array(x, jnp.float32), placed)
    return new._replace(params=new.params | placed, ema=new.ema | copied)
