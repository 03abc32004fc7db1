# SPDX-License-Identifier: Apache-2.0
"""The first and the second process that sample the same: seconds to the first step.

python -m benchmarks.warm_start --to result.json
python -m benchmarks.warm_start --cases 384p_5s --clock wall

Every process is a new one: it imports, reads weights from a file, reads a prompt, and
ends after its first Euler step. In turns, one finds no programs, one those that the
first has kept, and one those of JAX's own cache, which are traced and lowered again. A
step that is taken a second time tells what of the first one was running. Released
sizes need a GPU or TPU; their random weights are made, not read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Spread, environment, plain, ratios, spread
from benchmarks.video import PRESETS, SMALL, Case, case
from benchmarks.workload import Workload
from launch import start
from pyramid_jax import programs
from pyramid_jax.checkpoint import files
from pyramid_jax.pipeline.video import VideoPipeline

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
MODES = {
    "cold": "no programs",
    "jax": "JAX's cache",
    "kept": "kept programs",
}
WORKS = {
    "middle": Workload(depth=8, width=512, heads=8, cells=(16, 24), sampled=3),
    "shallow": Workload(depth=2, width=64, heads=1, cells=(16, 24), sampled=3),
    "deep": Workload(depth=24, width=64, heads=1, cells=(16, 24), sampled=3),
}
CLOCKS = {"cpu": time.process_time, "wall": time.time}
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Split:
    """Seconds of one process, from its start to the end of its first Euler step.

    Args:
        programs: making, or finding, those of the text encoders and of the step.
        running: text encoders and step, once there are programs.
    """

    imports: float
    weights: float
    programs: float
    running: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Measured:
    """A case: sizes, bytes of weights, and what the processes of each mode took."""

    depth: int
    width: int
    cells: tuple[int, int]
    weights: int
    modes: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread]


class FirstStep(Exception):
    """The first Euler step has ended."""


def named_case(name: str) -> Case:
    """One of `WORKS` with the small text encoders and VAE, or a released model."""
    return replace(case(SMALL), work=WORKS[name]) if name in WORKS else case(name)


def first_step(model: VideoPipeline, of: Case) -> None:
    """Samples until the first Euler step has ended."""

    def stop(_: Any) -> None:
        raise FirstStep

    try:
        model.run(of.request(model, "a prompt"), callback_on_step_end=stop)
    except FirstStep:
        return


def run_process(name: str, mode: str, weights: Path, began: float, clock: str) -> Split:
    """What one process does, this one.

    Args:
        began: its start on the clock.
    """
    now = CLOCKS[clock]
    marks = [began, now()]
    start.enable_compile_cache()
    if mode == "jax":
        programs.keep(None)
    of = named_case(name)
    if name in WORKS:
        loaded = files.read_weights(
            weights, stored(of.weights), files.placing(None, None)
        )
        of.__dict__["loaded"] = of.weights | restored(loaded)
    model = of.model()
    jax.block_until_ready(of.loaded)
    marks.append(now())
    for _ in range(2):
        first_step(model, of)
        marks.append(now())
    imports, read, step, again = np.diff(marks).tolist()
    return Split(imports, read, step - again, again)


def stored(trees: dict[str, Any]) -> dict[str, Any]:
    """The weights of a case as a file holds them, which has no tuples."""
    encoders = enumerate(trees["text encoders"])
    return trees | {"text encoders": {str(i): x for i, x in encoders}}


def restored(trees: dict[str, Any]) -> dict[str, Any]:
    """The weights of a case that `stored` made fit for a file."""
    encoders = trees["text encoders"]
    return trees | {"text encoders": tuple(encoders[i] for i in sorted(encoders))}


def write_case(of: Case, folder: Path) -> int:
    """Writes random weights; how many bytes."""
    draw = np.random.default_rng(0)

    def drawn(x: Any) -> np.ndarray:
        return draw.standard_normal(x.shape, np.float32) * np.float32(0.02)

    params = jax.tree.map(drawn, stored(of.weights))
    files.write_weights(folder, params)
    return sum(x.nbytes for x in jax.tree.leaves(params))


def new_process(
    name: str, mode: str, folder: Path, programs_in: Path, clock: str
) -> Split:
    """Runs a process to its first step, with its programs in a folder."""
    asked = ["--process", name, mode, str(folder), "--clock", clock]
    began = "0" if clock == "cpu" else str(time.time())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.warm_start", *asked, "--began", began],
        cwd=ROOT,
        env=os.environ | {start.CACHES: str(programs_in)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Split(**json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, repeats: int, clock: str) -> Measured:
    """Processes of every mode in turns, each turn with new programs."""
    of, splits = named_case(name), dict[str, list[Split]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_case(of, folder) if name in WORKS else 0
        run = (name, folder, clock)
        _run(run, "jax", folder / "jax")  # fills JAX's cache
        for turn in range(repeats):
            for mode in MODES:
                caches = folder / ("jax" if mode == "jax" else f"kept{turn}")
                splits.setdefault(mode, []).append(_run(run, mode, caches))
                print(f"{name} {mode}: {splits[mode][-1]}", file=sys.stderr)
    parts = [*(field.name for field in fields(Split)), "total"]
    modes = {
        mode: {part: spread([getattr(x, part) for x in of_mode]) for part in parts}
        for mode, of_mode in splits.items()
    }
    totals = {mode: [x.total for x in of_mode] for mode, of_mode in splits.items()}
    made = {mode: [x.programs for x in of_mode] for mode, of_mode in splits.items()}
    over = {
        "total, cold / kept": ratios(totals, "cold", "kept"),
        "total, jax / kept": ratios(totals, "jax", "kept"),
        "programs, cold / kept": ratios(made, "cold", "kept"),
        "programs, jax / kept": ratios(made, "jax", "kept"),
    }
    work = of.work
    return Measured(work.depth, work.width, work.cells, size, modes, over)


def _run(run: tuple[str, Path, str], mode: str, caches: Path) -> Split:
    name, folder, clock = run
    return new_process(name, mode, folder, caches, clock)


def report(results: dict[str, Measured], clock: str) -> str:
    """The results as tables for a terminal."""
    lines = []
    for name, got in results.items():
        lines += [
            f"{name}: {got.depth} blocks of width {got.width}, latents "
            f"{got.cells[0]} x {got.cells[1]}, {got.weights / 2**20:.0f} MiB of weights"
        ]
        head = "".join(f"{part:>10}" for part in got.modes["cold"])
        lines.append(f"{f'{clock} seconds':16}{head}")
        for mode, parts in got.modes.items():
            numbers = "".join(f"{x.median:10.2f}" for x in parts.values())
            lines.append(f"{MODES[mode]:16}{numbers}")
        lines += [f"{over:24}{ratio}" for over, ratio in got.ratios.items()]
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, (*WORKS, *PRESETS[1:])
    add("--cases", nargs="+", choices=names, default=list(WORKS), help="default: small")
    add("--repeats", type=int, default=3, help="default 3")
    add("--clock", choices=CLOCKS, default="cpu", help="default cpu, of all threads")
    add("--to", type=Path, help="JSON file for the result")
    add("--process", nargs=3, help=argparse.SUPPRESS)
    add("--began", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process:
        name, mode, folder = args.process
        split = run_process(name, mode, Path(folder), args.began, args.clock)
        print(json.dumps(asdict(split)))
        return
    results = {name: measure(name, args.repeats, args.clock) for name in args.cases}
    if args.to is not None:
        result = {"clock": args.clock, "environment": environment(PACKAGES)}
        text = json.dumps(plain(result | {"cases": results}), indent=2) + "\n"
        args.to.parent.mkdir(parents=True, exist_ok=True)
        args.to.write_text(text, encoding="utf-8")
    print(report(results, args.clock))


if __name__ == "__main__":
    main()
