# SPDX-License-Identifier: Apache-2.0
"""A training run of any model: state, steps, checkpoints and metrics in a folder."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.config import build
from pyramid_jax.training.loop import LoopConfig, Sample, check_processes, train_loop
from pyramid_jax.training.metrics import JSONL, Metrics, plot_loss
from pyramid_jax.training.state import (
    Init,
    TrainState,
    abstract_state,
    create_state,
    with_moments,
)
from pyramid_jax.training.step import Loss, StepConfig, train_step

logger = logging.getLogger(__name__)

# Sections that may differ when a run is continued.
MAY_CHANGE = {"loop", "machine", "mesh", "sample", "prompts"}


def run_training(
    cfg: Any,
    workdir: str | Path,
    *,
    init: Init,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    batches: grain.DatasetIterator[Any],
    sample: Sample,
    pretrained: Callable[[], Mapping[str, Any]] = dict,
) -> TrainState:
    """Trains as the sections step, mesh, loop and seed of a config say; the last state.

    The folder gets checkpoints/, metrics.jsonl, TensorBoard files and loss.png. A run
    that the folder already holds is continued. The batches are closed.

    Args:
        rate: the learning rate, for the metrics.
        sample: is also called at the end.
        pretrained: loads weights that a new run starts from (see `with_weights`); a
            continued run does not call it.

    Raises:
        ValueError: a section is wrong, or the folder is of another config.
    """
    if not 0 <= cfg.seed < 2**31:  # JAX keeps 32 bits; others would share weights
        raise ValueError(f"seed {cfg.seed} must be a whole number of 0 to 2147483647")
    workdir, key = Path(workdir), jax.random.key(cfg.seed)
    mesh = sharding.device_mesh(**cfg.mesh.to_dict())
    check_processes(mesh)
    like = abstract_state(init, optimizer, mesh)
    how = build(StepConfig, cfg.step.to_dict())
    step = train_step(loss, optimizer, rate, how, with_moments(like, how.moments))
    sections = {k: v for k, v in cfg.to_dict().items() if k not in MAY_CHANGE}
    loop = build(LoopConfig, cfg.loop.to_dict())
    if loop.steps < cfg.optimizer.warmup_steps:
        logger.warning(
            "the run ends after %d steps (loop.steps), within its warm-up of %d "
            "(optimizer.warmup_steps): it never has the full learning rate",
            loop.steps,
            cfg.optimizer.warmup_steps,
        )
    with (
        Store(workdir / "checkpoints", sections) as store,
        closing(Metrics(workdir)) as metrics,
    ):
        if store.latest() is None:
            state = create_state(key, init, optimizer, mesh)
            state = with_weights(state, pretrained())
        else:
            logger.info("continuing from step %d", store.latest())
            state = store.restore(like, batches)
        last = train_loop(
            loop,
            step,
            with_moments(state, how.moments),
            batches,
            jax.random.fold_in(key, 1),
            store=store,
            metrics=metrics,
            sample=sample,
        )
        batches.close()
        sampled = loop.sample_every and int(last.step) % loop.sample_every == 0
        if not sampled and (values := sample(int(last.step), last.ema)):
            metrics.write(int(last.step), values)
            logger.info("after %d steps: %s", last.step, values)
    if jax.process_index() == 0:
        plot_loss(workdir / JSONL, workdir / "loss.png")
    return last


def with_weights(state: TrainState, weights: Mapping[str, Any]) -> TrainState:
    """The state with the given entries of the weights instead of its own.

    Their average is a copy of them.
    """
    own = {name: state.params[name] for name in weights}
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), dict(weights), own
    )
    copied = jax.tree.map(lambda x: jnp.array(x, jnp.float32), placed)
    return state._replace(params=state.params | placed, ema=state.ema | copied)
