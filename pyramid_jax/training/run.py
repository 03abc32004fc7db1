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
from jax.sharding import Mesh

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.config import build
from pyramid_jax.training.loop import LoopConfig, Sample, train_loop
from pyramid_jax.training.metrics import JSONL, Arithmetic, Metrics, plot_loss
from pyramid_jax.training.origin import write_start
from pyramid_jax.training.state import (
    TrainState,
    abstract_state,
    create_state,
    with_moments,
)
from pyramid_jax.training.step import StepConfig
from pyramid_jax.training.task import Task, task_step

logger = logging.getLogger(__name__)

# Sections and entries that may differ when a run is continued: what is computed is the
# same. So may the hosts: neither rows nor weights know them.
MAY_CHANGE = (
    *("loop", "machine", "mesh", "sample", "prompts", "step.accumulate"),
    *("step.float32_sums", "step.moments"),
    *("data.workers", "data.cache_mib", "data.max_bad"),
    *("model.dit.remat", "model.dit.attention"),
)


def run_training(
    cfg: Any,
    workdir: str | Path,
    task: Task,
    *,
    batches: Callable[[Mesh], grain.DatasetIterator[Any]],
    sample: Sample,
    validate: Sample | None = None,
    pretrained: Callable[[], Mapping[str, Any]] = dict,
    frozen: Callable[[Mesh], Any] = lambda mesh: None,
    arithmetic: Arithmetic | None = None,
) -> TrainState:
    """Trains as the sections step, mesh, loop and seed of a config say; the last state.

    The folder gets checkpoints/, metrics.jsonl, TensorBoard files, loss.png, and a line
    of starts.jsonl for each start (see `write_start`). A run that the folder already
    holds is continued.

    Args:
        batches: makes the iterator over the rows that this process's devices need, for
            a mesh (`sharding.own_rows`); it is closed at the end.
        sample: is also called at the end.
        validate: is called before each save; the checkpoint with the least
            `validation_loss` is kept beside the newest.
        pretrained: loads weights that a new run starts from (see `with_weights`); a
            continued run does not call it.
        frozen: loads weights that stay as they are, which no checkpoint holds.
        arithmetic: of a step, for the metrics; None: it is not counted.

    Raises:
        ValueError: a section is wrong, or the folder is of another config.
    """
    if not 0 <= cfg.seed < 2**31:  # JAX keeps 32 bits; others would share weights
        raise ValueError(f"seed {cfg.seed} must be a whole number of 0 to 2147483647")
    workdir, key = Path(workdir), jax.random.key(cfg.seed)
    mesh = sharding.device_mesh(**cfg.mesh.to_dict())
    like, fixed = abstract_state(task.init, task.optimizer, mesh), frozen(mesh)
    how = build(StepConfig, cfg.step.to_dict())
    step, _ = task_step(task, how, like, fixed)
    loop = build(LoopConfig, cfg.loop.to_dict())
    if loop.steps < cfg.optimizer.warmup_steps:
        logger.warning(
            "the run ends after %d steps (loop.steps), within its warm-up of %d "
            "(optimizer.warmup_steps): it never has the full learning rate",
            loop.steps,
            cfg.optimizer.warmup_steps,
        )
    with (
        closing(batches(mesh)) as rows,
        Store(workdir / "checkpoints", cfg.to_dict(), may_change=MAY_CHANGE) as store,
        closing(Metrics(workdir, loop.wandb)) as metrics,
    ):
        if store.latest() is None:
            state = create_state(key, task.init, task.optimizer, mesh)
            state = with_weights(state, pretrained())
        else:
            logger.info("continuing from step %d", store.latest())
            state = store.restore(like, rows)
        state = state._replace(frozen=fixed)
        write_start(workdir, cfg, int(state.step))
        last = train_loop(
            loop,
            step,
            with_moments(state, how.moments),
            rows,
            jax.random.fold_in(key, 1),
            store=store,
            metrics=metrics,
            sample=sample,
            validate=validate,
            arithmetic=arithmetic,
        )
        sampled = loop.sample_every and int(last.step) % loop.sample_every == 0
        if not sampled and (values := sample(int(last.step), last.averages())):
            metrics.write(int(last.step), values)
            logger.info("after %d steps: %s", last.step, values)
    if jax.process_index() == 0:
        plot_loss(workdir / JSONL, workdir / "loss.png")
    return last


def best_average(workdir: str | Path, last: TrainState) -> Any:
    """The moving average of the best checkpoint of a run, laid out as that of `last`.

    None if that is the last one, or nothing was measured.
    """
    with Store(Path(workdir) / "checkpoints", {}) as store:
        if (best := store.best()) in (None, int(last.step)):
            return None
        return store.average(best, last.ema)


def with_weights(state: TrainState, weights: Mapping[str, Any]) -> TrainState:
    """The state with the given entries of the weights instead of its own.

    They get the types and places of its own, also if they were stored with fewer bits;
    their average is a copy of them.
    """

    def place(x: Any, like: jax.Array) -> jax.Array:
        return jax.device_put(x.astype(like.dtype), like.sharding)

    own = {name: state.params[name] for name in weights}
    placed = jax.tree.map(place, dict(weights), own)
    copied = jax.tree.map(lambda x: jnp.array(x, jnp.float32), placed)
    return state._replace(params=state.params | placed, ema=state.ema | copied)
