# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: lines of metrics.jsonl, TensorBoard files, and a plot."""

import importlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Real
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from pyramid_jax import sharding
from pyramid_jax.shapes import Rows
from pyramid_jax.training.step import Report

JSONL = "metrics.jsonl"
AHEAD = 2  # steps in the device's queue while the host prepares the next one


class Means(NamedTuple):
    """Values that a loss reports by name: their sums over `weight` microbatches."""

    sums: dict[str, Any]
    weight: Any


class RowWork(NamedTuple):
    """The arithmetic of every row of a batch, in FLOP.

    `needed` is what the model takes for what is in the row, `computed` what a device
    does, which is also done for places that are empty.
    """

    needed: Real[np.ndarray, "b"]
    computed: Real[np.ndarray, "b"]


class Arithmetic(NamedTuple):
    """How the work of a batch is counted, and how much of it a device could do.

    `peak` is in FLOP per second; None: nobody knows.
    """

    count: Callable[[Any], RowWork]
    peak: float | None = None


class Metrics:
    """Writes numbers by step to metrics.jsonl and TensorBoard files in `folder`.

    Only the first process writes.

    Args:
        project: at Weights & Biases, which gets the numbers, too, if it is not "".

    Raises:
        ValueError: there is a project, but wandb is not installed.
    """

    def __init__(self, folder: str | Path, project: str = ""):
        self.folder = Path(folder)
        self._jsonl, self._board, self._online = self.folder / JSONL, None, None
        if jax.process_index() == 0:
            self._board = SummaryWriter(str(folder), flush_secs=30)
            self._jsonl.touch()
            self._online = _online(self.folder, project) if project else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line; it is on disk when this returns."""
        if self._board is None:
            return
        with self._jsonl.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._online is not None:
            self._online.log(dict(values), step=step)

    def close(self) -> None:
        """Closes the TensorBoard file, and ends what is sent."""
        if self._board is not None:
            self._board.close()
        if self._online is not None:
            self._online.finish()


def _online(folder: Path, project: str) -> Any:
    """A run of this folder at Weights & Biases; the same one when it is continued."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"loop.wandb={project} needs wandb; pip install wandb, or leave it empty"
        ) from error
    name = re.sub(r"\W+", "-", str(folder.resolve()).strip("/"))
    return wandb.init(project=project, id=name, dir=str(folder), resume="allow")


class MetricsWindow:
    """The reports of the steps since the last line, and how fast the steps went.

    `skipped_in_a_row` counts the last steps that were skipped, some steps late.

    Args:
        mesh: over which the rows of batches are divided.
        skipped: steps before the first one.
        arithmetic: of batches, where it can be counted.
    """

    def __init__(
        self, mesh: Mesh, skipped: int = 0, arithmetic: Arithmetic | None = None
    ):
        self._mesh, self._arithmetic = mesh, arithmetic
        self._reports: list[Report] = []
        self._unread = deque[Any]()  # counters of skipped steps
        self._counter = skipped
        self.skipped_in_a_row = 0
        self._warm = False
        self.restart()

    def restart(self) -> None:
        """Restarts the clock after something that is not training."""
        self._start, self._waited = time.monotonic(), 0.0
        self._steps = 0
        self._rows: list[dict[str, np.ndarray]] = []  # of every step

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time until it is there is measured."""
        begin = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - begin
        return batch

    def add(self, report: Report, batch: Any) -> None:
        """Adds a step's report without reading it, which would wait for the device."""
        self._reports.append(report)
        self._unread.append(report.skipped)
        if not self._warm:  # compiling is not training either
            jax.block_until_ready(report)
            self._warm = True
            return self.restart()
        if len(self._unread) > AHEAD:
            self._read(self._unread.popleft())
        self._steps += 1
        if isinstance(batch, Rows):
            self._rows.append(self._counts(batch))

    def close(self) -> dict[str, float]:
        """The numbers of the steps since the last line; waits for the device."""
        reports = jax.device_get(self._reports)
        self._reports = []
        values = summary(reports)
        if self._steps:
            seconds = time.monotonic() - self._start
            values["steps_per_second"] = self._steps / seconds
            values["data_wait"] = self._waited / seconds
            if self._rows:
                values |= self._rates(seconds)
        self.restart()
        return values | _memory()

    def _counts(self, rows: Rows) -> dict[str, np.ndarray]:
        """What is counted of this process's rows of a step."""
        there = np.asarray(rows.segment) >= 0
        places = np.full(len(there), there.shape[1])
        counts = {"tokens": there.sum(axis=1), "places": places}
        if self._arithmetic is not None:
            counts |= self._arithmetic.count(rows)._asdict()
        return {name: np.asarray(x, np.float32) for name, x in counts.items()}

    def _rates(self, seconds: float) -> dict[str, float]:
        """What all processes did, by second, by place, and device beside device."""
        own = jax.tree.map(lambda *steps: np.stack(steps, axis=1), *self._rows)
        every = sharding.to_host(sharding.global_batch(own, self._mesh))
        sums = {name: x.sum(dtype=np.float64) for name, x in every.items()}
        values = {
            "tokens_per_second": sums["tokens"] / seconds,
            "token_utilisation": sums["tokens"] / sums["places"],
        }
        if self._arithmetic is not None:
            rate = sums["needed"] / seconds
            devices = sharding.parts("batch", self._mesh)
            values["model_tflops_per_second"] = rate / 1e12
            values["imbalance"] = imbalance(every["computed"], devices)
            if (peak := self._arithmetic.peak) is not None:
                values["utilisation"] = rate / peak / self._mesh.size
        return {name: float(x) for name, x in values.items()}

    def _read(self, counter: Any) -> None:
        """Counts how many of the last steps were skipped; waits for one of them."""
        before, self._counter = self._counter, int(counter)
        row = self.skipped_in_a_row + 1
        self.skipped_in_a_row = row if self._counter > before else 0


def _memory() -> dict[str, float]:
    """The most that a device of this process has held, where the runtime tells."""
    told = (device.memory_stats() or {} for device in jax.local_devices())
    peaks = [x["peak_bytes_in_use"] for x in told if "peak_bytes_in_use" in x]
    return {"device_gib": max(peaks) / 2**30} if peaks else {}


def summary(reports: Sequence[Report]) -> dict[str, float]:
    """The mean losses of some steps (fetched reports), and the last step's counters.

    If `aux` has `stage_sum` and `stage_count`, the mean loss of each stage is added; if
    it is `Means`, each of its means. Steps without a finite loss and gradient, which
    were skipped, are not in the means.
    """
    last = reports[-1]
    values = {
        "learning_rate": float(last.learning_rate),
        "skipped": int(last.skipped),
    }
    reports = [r for r in reports if np.isfinite([r.loss, r.gradient_norm]).all()]
    if not reports:
        return values
    weights = [report.aux.weight for report in reports]
    norms = [report.gradient_norm for report in reports]
    values["loss"] = float(np.average([r.loss for r in reports], weights=weights))
    values["gradient_norm"] = float(np.mean(norms))
    if hasattr(last.aux, "stage_sum"):
        total = np.sum([report.aux.stage_sum for report in reports], axis=0)
        count = np.sum([report.aux.stage_count for report in reports], axis=0)
        for stage in np.flatnonzero(count):
            values[f"loss_stage_{stage}"] = float(total[stage] / count[stage])
    if isinstance(last.aux, Means):
        for name in last.aux.sums:
            total = sum(report.aux.sums[name] for report in reports)
            values[name] = float(total / sum(weights))
    return values


def imbalance(computed: Float[np.ndarray, "b steps"], devices: int) -> float:
    """How much more than the mean the device with the most work computes, in a step.

    Args:
        computed: of all rows, of which every device has as many, one after the other.
    """
    work = computed.reshape(devices, -1, computed.shape[1]).sum(axis=1)
    return float((work.max(axis=0) / work.mean(axis=0) - 1).mean())


def read_metrics(jsonl: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; those that a restart repeated replace the first."""
    lines: list[dict[str, float]] = []
    for line in Path(jsonl).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        while lines and lines[-1]["step"] > values["step"]:
            lines.pop()
        if lines and lines[-1]["step"] == values["step"]:
            lines[-1] |= values
        else:
            lines.append(values)
    return lines


def plot_loss(jsonl: str | Path, png: str | Path) -> None:
    """Draws the loss and the loss of each stage over the steps, smoothed, on log axes.

    Raises:
        ValueError: no line of `jsonl` has a loss.
    """
    lines = [line for line in read_metrics(jsonl) if "loss" in line]
    if not lines:
        raise ValueError(
            f"{jsonl} holds no losses; plot a run that has logged at least once"
        )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = sorted({n for line in lines for n in line if n.startswith("loss")})
    for name in names:
        step, value = np.array([(x["step"], x[name]) for x in lines if name in x]).T
        label = name.removeprefix("loss_").replace("_", " ")
        axes.plot(step, smooth(value), label=label, lw=2 if name == "loss" else 1)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="squared error")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=150)


def smooth(
    values: Float[np.ndarray, "n"], share: float = 0.05
) -> Float[np.ndarray, "n"]:
    """Centred means, each over `share` of the values so far, at least over one."""
    before = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum((index * share / 2).astype(int), len(values) - 1 - index)
    return (before[index + half + 1] - before[index - half]) / (2 * half + 1)
