# SPDX-License-Identifier: Apache-2.0
"""Timing that survives a busy machine: runs in turns, medians, ratios of neighbours."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

Times = dict[Any, list[float]]

# Seconds on the wall, or of all this process's threads: the latter can be compared also
# where other programs take turns on the processor.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Spread(NamedTuple):
    """The median of a measurement and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    runs: Mapping[Any, Callable[[], Any]], repeats: int, clock: str = "wall"
) -> Times:
    """Seconds of every run, `repeats` times each, in turns after one warm-up round.

    What slows the machine for a while slows neighbouring runs alike. A run that returns
    arrays ends when they are there.
    """
    names, now = list(runs), CLOCKS[clock]
    times: Times = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names if turn % 2 else reversed(names):
            begin = now()
            jax.block_until_ready(runs[name]())
            if turn:
                times[name].append(now() - begin)
    return times


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def ratios(times: Times, over: str, under: str) -> Spread:
    """How often `under` fits into `over`, turn by turn."""
    pairs = zip(times[over], times[under], strict=True)
    return spread([a / b for a, b in pairs])


def environment(packages: tuple[str, ...], commit: str | None = None) -> dict[str, Any]:
    """What a result depends on: commit, processor, threads, versions of `packages`.

    Args:
        commit: of the sources; None asks git.
    """
    return {
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "cpu": _processor(),
        "threads": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def plain(value: Any) -> Any:
    """A result as JSON stores it: structures become objects."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _commit() -> str:
    """The commit of this checkout; "unknown" in a copy without git."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(git, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
