# SPDX-License-Identifier: Apache-2.0
"""Measures all that a few minutes of a GPU or TPU should tell, most valuable first.

    python -m benchmarks.device --to=runs/device --budget=540
    python -m benchmarks.device --to=runs/device --only=euler_768p,attention_768p
    python -m benchmarks.device --to=runs/tiny --tiny    # small shapes, for a CPU

Every step runs in a process of its own and has a share of the time; what it leaves, the
later ones get. One that crashes, hangs, or fills the memory ends alone. Every number is
in results.jsonl of the folder as soon as it is known, steps.log has what was printed. A
step that is run again replaces its results. Weights are random, no files are needed.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import jax

from benchmarks.device.records import OUTPUT, RESULTS, Log, read_records
from benchmarks.device.report import DONE, heading, report
from benchmarks.device.steps import STEPS, part
from benchmarks.timing import environment
from launch import start, usage

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "tokamax")
LEAST = 5.0  # seconds that must be left for a step to start
# PyTorch needs memory beside JAX, which keeps what it has once had.
MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the steps that the arguments ask for, and prints tables."""
    options = parse(argv)
    folder = options.to
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in MEMORY.items():
        os.environ.setdefault(name, value)
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
    start.enable_compile_cache()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1  # unless a step comes to its end
    try:
        for name, seconds in timetable(options.only, options.budget):
            print(f"{name}: up to {seconds:.0f} s", flush=True)
            log, outcome = Log(folder, name), "no time left"
            if seconds:
                outcome = run(log, seconds, options.tiny, options.commit)
            log("ends", outcome=outcome, allotted=round(seconds, 1))
            code = 0 if outcome == DONE else code
    except KeyboardInterrupt:
        code = start.INTERRUPTED
    if (folder / RESULTS).exists():
        records = read_records(folder / RESULTS)
        print(f"\n{heading(records)}\n\n{report(records)}")
    sys.exit(code)


def timetable(names: Sequence[str], budget: float) -> Iterator[tuple[str, float]]:
    """Each step when its turn comes, and how long it may take then.

    What one leaves, the later ones get. In the end there may be none, 0.
    """
    end = time.monotonic() + budget
    for i, name in enumerate(names):
        left = end - time.monotonic()
        yield name, left * part(name, names[i + 1 :]) if left >= LEAST else 0.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; ends the process with one line for a mistake."""
    parser = usage.OneLineParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--to", type=Path, default=Path("runs/device"), help="folder for results")
    add("--budget", type=float, default=540.0, help="seconds in all; default 540")
    add("--only", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    add("--tiny", action="store_true", help="small shapes on the CPU")
    add("--commit", help="of the sources, where git can't tell")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    if not 0 < options.budget < math.inf:
        parser.error(f"--budget={options.budget}: expected seconds, e.g. 540")
    try:
        start.check_writable(options.to)
    except ValueError as error:
        parser.error(str(error))
    return options


def run(log: Log, seconds: float, tiny: bool, commit: str | None) -> str:
    """Runs a step in a process of its own, and says how it ended.

    The process is a fork: the libraries are there, no device has been touched.
    """
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_in_child, args=(log, tiny, commit))
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            return "out of time"
        code = process.exitcode or 0
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return "failed" if code else DONE
    finally:
        # With all that it has started, compilers for example.
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def _in_child(log: Log, tiny: bool, commit: str | None) -> None:
    os.setsid()
    with (log.folder / OUTPUT).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    print(f"==== {log.step}", flush=True)
    try:
        where = environment(PACKAGES, commit)
        log("begins", tiny=tiny, environment=where)
        if not tiny and jax.default_backend() == "cpu":
            raise ValueError("JAX sees no accelerator here; --tiny is for CPUs")
        STEPS[log.step].run(log, tiny)
    except Exception as reason:
        traceback.print_exc()
        log("failed", reason=f"{type(reason).__name__}: {reason}"[:500])
        sys.exit(1)


if __name__ == "__main__":
    main()
