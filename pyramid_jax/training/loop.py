# SPDX-License-Identifier: Apache-2.0
"""The training loop: it iterates, logs, saves and samples, and does nothing else."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.config import check_entries
from pyramid_jax.training.metrics import Arithmetic, Metrics, MetricsWindow
from pyramid_jax.training.state import TrainState
from pyramid_jax.training.step import Step


@dataclass(frozen=True)
class LoopConfig:
    """When a run logs, saves, samples and ends; numbers are steps.

    Args:
        steps: the run ends after this many, those before a restart included.
        sample_every: 0 never samples.
        max_seconds: the run saves and ends after so much time; None has no limit.
        bad_steps: so many skipped steps in a row save and end the run with an error.
        profile: the first and the last step that JAX's profiler watches, whose trace is
            in profile/. The first step of a start is compiled, and not watched.
        wandb: project at Weights & Biases that gets the metrics, too; "": none.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 0
    max_seconds: float | None = None
    bad_steps: int = 10
    profile: tuple[int, int] | None = None
    wandb: str = ""

    def __post_init__(self):
        counts = ("steps", "log_every", "save_every", "bad_steps")
        check_entries(self, lambda n: n >= 1, "1 or more", *counts)
        never = "positive, or 0 for never"
        check_entries(self, lambda n: n >= 0, never, "sample_every")
        if self.profile and not 2 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"profile {self.profile} must be a first step, 2 or later, and a last "
                "one, e.g. (10, 12)"
            )


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
    validate: Sample | None = None,
    arithmetic: Arithmetic | None = None,
) -> TrainState:
    """Trains until a limit of `cfg` or a signal, saves, and returns the last state.

    SIGINT (Ctrl-C) and SIGTERM end the run after the current step, and on another of
    several processes at most two steps later; a second one at once. Checkpoints are
    written in the background: close the store afterwards.

    Args:
        state: consumed; it lies on the mesh that the run uses.
        batches: an iterator over the rows of this process (`sharding.own_rows`), as
            trees of numpy arrays, with `get_state` and `set_state`; `next` is called
            once per step.
        key: the same one at a restart.
        validate: is called before each save; the checkpoint keeps what it measures.
        arithmetic: of a step, for the metrics.

    Raises:
        FloatingPointError: `bad_steps` in a row were skipped; the state is saved.
        ValueError: the rows of a batch can't be divided over the mesh.
    """
    mesh: Mesh = state.step.sharding.mesh
    done = begun = int(state.step)
    window = MetricsWindow(mesh, int(state.skipped), arithmetic)
    vote = _Vote(mesh)
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
    trace = _Trace(cfg.profile, metrics)
    with bar, closing(trace), jax.set_mesh(mesh), _signals() as stopped:
        while done < cfg.steps:
            batch = window.next(batches)
            rows = sharding.global_batch(batch, mesh)
            # The first step places constants; later ones move nothing unseen.
            moves = "allow" if done == begun else "disallow"
            with jax.transfer_guard_host_to_device(moves):
                state, report = step(state, rows, key)
            done += 1
            window.add(report, batch)
            if done == begun + 1:  # compiling says nothing about the time left
                bar.desc, bar.initial, bar.start_t = "", done, time.time()
            bar.update()
            trace.after(done, report)

            ends = vote.passes(stopped.is_set() or time.monotonic() > deadline)
            fails = window.skipped_in_a_row >= cfg.bad_steps
            ends = ends or fails or done == cfg.steps
            saves = ends or done % cfg.save_every == 0
            samples = cfg.sample_every > 0 and done % cfg.sample_every == 0
            if saves or samples or done % cfg.log_every == 0:
                values = window.close()
                if saves:
                    measured = (validate and validate(done, state.averages())) or {}
                    values |= measured
                    kept = state._replace(frozen=None)
                    store.save(done, kept, batches, measured)
                if samples and sample is not None:
                    values |= sample(done, state.averages()) or {}
                metrics.write(done, values)
                bar.set_postfix_str(_short(values))
                window.restart()
            if fails:
                raise FloatingPointError(_failure(done, cfg, report))
            if ends:
                break
    return state


def _failure(done: int, cfg: LoopConfig, report: Any) -> str:
    loss, norm = (float(x) for x in (report.loss, report.gradient_norm))
    return (
        f"step {done}: the last {cfg.bad_steps} steps or more were skipped (loss "
        f"{loss}, gradient norm {norm}). Usual causes: a learning rate too high, a "
        "warm-up too short, values in the data that are not finite, a low "
        "step.skip_above. The state before them is saved; the same command goes on "
        "with the data behind them"
    )


class _Trace:
    """What JAX's profiler sees of some steps, in a folder that TensorBoard reads.

    Args:
        steps: the first and the last one, or None.
        metrics: those of the run, beside which the folder is.
    """

    def __init__(self, steps: tuple[int, int] | None, metrics: Metrics):
        self._steps, self._metrics, self._on = steps or (1, 0), metrics, False

    def after(self, done: int, report: Any) -> None:
        """Begins or ends behind a step."""
        first, last = self._steps
        if not self._on and first <= done + 1 <= last:
            jax.block_until_ready(report)
            jax.profiler.start_trace(self._metrics.folder / "profile")
            self._on = True
        elif self._on and done == last:
            jax.block_until_ready(report)
            self.close()

    def close(self) -> None:
        """Writes what was seen, if the last step has not come."""
        if self._on:
            jax.profiler.stop_trace()
        self._on = False


class _Vote:
    """Whether any process wants to end, known to all of them at the same step.

    The votes of a step are added up by the devices behind its other work, and read
    when the next step has begun, so that no device waits for them.
    """

    def __init__(self, mesh: Mesh):
        self._placement = NamedSharding(mesh, P(mesh.axis_names))
        self._count = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._last: jax.Array | None = None

    def passes(self, here: bool) -> bool:
        """Votes for this step; the result of the last one, or of this one if alone."""
        if jax.process_count() == 1:
            return here
        shape = (self._placement.mesh.size,)
        votes = jax.make_array_from_callback(
            shape, self._placement, lambda index: np.full(1, here)
        )
        last, self._last = self._last, self._count(votes)
        return last is not None and bool(last)


def _short(values: dict[str, float]) -> str:
    """The numbers that fit in the progress bar."""
    losses = [f"{v:.4f}" for n, v in values.items() if n == "loss"]
    losses += [f"{v:.3f}" for n, v in values.items() if n.startswith("loss_stage_")]
    text = f"loss {' '.join(losses)}, lr {values['learning_rate']:.1e}"
    if "tokens_per_second" in values:
        text += f", {values['tokens_per_second']:,.0f} tokens/s"
    if "utilisation" in values:
        text += f", {values['utilisation']:.0%} of the peak"
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
