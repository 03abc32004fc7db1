# SPDX-License-Identifier: Apache-2.0
"""The training loop: it iterates, logs, saves and samples, and does nothing else."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.config import check_entries
from pyramid_jax.training.metrics import Metrics, MetricsWindow
from pyramid_jax.training.state import TrainState
from pyramid_jax.training.step import Step


@dataclass(frozen=True)
class LoopConfig:
    """When a run logs, saves, samples and ends; numbers are steps.

    Args:
        steps: the run ends after this many, those before a restart included.
        sample_every: 0 never samples.
        max_seconds: the run saves and ends after so much time; None has no limit.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 0
    max_seconds: float | None = None

    def __post_init__(self):
        counts = ("steps", "log_every", "save_every")
        check_entries(self, lambda n: n >= 1, "1 or more", *counts)
        never = "positive, or 0 for never"
        check_entries(self, lambda n: n >= 0, never, "sample_every")


# (step, average weights) -> measurements for the metrics, if there are any
Sample = Callable[[int, Any], dict[str, float] | None]


def train_loop(
    cfg: LoopConfig,
    step: Step,
    state: TrainState,
    batches: Any,
    key: jax.Array,
    *,
    store: Store,
    metrics: Metrics,
    sample: Sample | None = None,
) -> TrainState:
    """Trains until a limit of `cfg` or a signal, saves, and returns the last state.

    SIGINT (Ctrl-C) and SIGTERM end the run after the current step, a second one at
    once. Checkpoints are written in the background: close the store afterwards.

    Args:
        state: consumed; it lies on the mesh that the run uses.
        batches: an iterator over rows of this process, as trees of numpy arrays, with
            `get_state` and `set_state`; `next` is called once per step.
        key: the same one at a restart.

    Raises:
        FloatingPointError: a loss or gradient was not finite; nothing is saved then.
        ValueError: the rows of a batch can't be divided over the mesh.
    """
    mesh: Mesh = state.step.sharding.mesh
    done = begun = int(state.step)
    window = MetricsWindow()
    deadline = time.monotonic() + (cfg.max_seconds or float("inf"))
    silent = jax.process_index() > 0
    bar = tqdm(
        desc="compiling",
        total=cfg.steps,
        initial=done,
        unit="step",
        disable=silent,
        smoothing=0,
    )
    with bar, jax.set_mesh(mesh), _signals() as stopped:
        while done < cfg.steps:
            batch = next(batches)
            rows = global_batch(batch, mesh)
            # The first step places constants; later ones move nothing unseen.
            moves = "allow" if done == begun else "disallow"
            with jax.transfer_guard_host_to_device(moves):
                state, report = step(state, rows, key)
            done += 1
            window.add(report, batch)
            if done == begun + 1:  # compiling says nothing about the time left
                bar.desc, bar.initial, bar.start_t = "", done, time.time()
            bar.update()

            logs = done % cfg.log_every == 0
            ends = stopped.is_set() or time.monotonic() > deadline
            ends = done == cfg.steps or _anywhere(ends, logs)
            saves = ends or done % cfg.save_every == 0
            samples = cfg.sample_every > 0 and done % cfg.sample_every == 0
            if logs or saves or samples:
                values = window.close(done)
                if saves:
                    store.save(done, state, batches)
                if samples and sample is not None:
                    values |= sample(done, state.ema) or {}
                metrics.write(done, values)
                bar.set_postfix_str(_short(values))
                window.restart()
            if ends:
                break
    return state


def check_processes(mesh: Mesh) -> None:
    """Checks that devices which share rows belong to one process, which reads them.

    Raises:
        ValueError: an axis that does not divide a batch spans processes.
    """
    for name, axis in zip(mesh.axis_names, range(mesh.devices.ndim), strict=True):
        if name in sharding.mesh_axes("batch"):
            continue
        owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
        if (owners != owners.take([0], axis)).any():
            raise ValueError(
                f"the mesh's axis {name!r} of {mesh.shape[name]} devices spans "
                "processes, which would train on different rows; make it at most the "
                f"number of devices of a process ({jax.local_device_count()}), and "
                "divide the batch among processes (data, fsdp)"
            )


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch of all processes on the mesh, from this process's rows.

    Raises:
        ValueError: the rows can't be divided over the devices that share a batch.
    """
    hosts = jax.process_count()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * hosts, *x.shape[1:]), x.dtype),
        batch,
    )
    parts = sharding.parts("batch", mesh)
    for rows in {leaf.shape[0] for leaf in jax.tree.leaves(shapes)}:
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows can't be divided over {parts} devices; "
                f"use a multiple of {parts} rows"
            )
    placement = sharding.batch_shardings(shapes, mesh)
    return jax.tree.map(jax.make_array_from_process_local_data, placement, batch)


def _anywhere(here: bool, ask: bool) -> bool:
    """Whether any process wants to end; several processes only talk if `ask`."""
    if jax.process_count() == 1:
        return here
    return ask and bool(multihost_utils.process_allgather(np.array(here)).any())


def _short(values: dict[str, float]) -> str:
    """The numbers that fit in the progress bar."""
    losses = [f"{values['loss']:.4f}"]
    losses += [f"{v:.3f}" for n, v in values.items() if n.startswith("loss_stage_")]
    text = f"loss {' '.join(losses)}, lr {values['learning_rate']:.1e}"
    if "tokens_per_second" in values:
        text += f", {values['tokens_per_second']:,.0f} tokens/s"
    return text + (f", {values['skipped']} skipped" if values["skipped"] else "")


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the next one acts as before."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: Any) -> None:
        logging.info("%s: saving, then ending", signal.Signals(number).name)
        stopped.set()
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
