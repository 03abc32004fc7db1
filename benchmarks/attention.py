# SPDX-License-Identifier: Apache-2.0
"""Attention at released shapes: time and TFLOP/s of every implementation, side by side.

python -m benchmarks.attention --to result.json
python -m benchmarks.attention --cases '768p stage 2*' 'packed*' --heads 24
python -m benchmarks.attention --reduced

FLOP are counted on visible pairs of tokens, whatever an implementation computes beyond
them: 4 x pairs x heads x width forward, 3.5 times that with the gradients. Before a
clock starts, values and gradients are compared with the formula in float64. An
implementation that is not installed, does not fit the device or is wrong is listed with
the reason. `--reduced` is for machines without an accelerator.
"""

import argparse
import fnmatch
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Int

from benchmarks.attention_rivals import NAMES, Problem, Rival, Values, rival
from benchmarks.timing import Spread, environment, interleaved, plain, spread
from launch.compile.cases import GRIDS, STAGES, case
from pyramid_jax.flops import peak
from pyramid_jax.mask import TokenMask, visible_pairs

PACKAGES = ("jax", "jaxlib", "torch", "tokamax")
CASES = (
    *(
        f"{size} stage {stage} unit {unit}"
        for size in GRIDS
        for stage in range(STAGES)
        for unit in (1, 8, 15, 30)
    ),
    *(f"packed {tokens}" for tokens in (4096, 8192, 16384, 24576)),
)
SAMPLED = 32  # queries that are compared with the formula
# Largest difference, as a share of the largest value: products of float32 may be
# rounded to 11 bits on a GPU, weights of bfloat16 are to 8.
ALLOWED = {"float32": 2e-3, "bfloat16": 0.03}
BOTH = 3.5  # FLOP of forward and backward pass over those of the forward pass
TURN = 0.02  # seconds of work that are timed together


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        cases: names that `launch.compile.cases.case` knows.
        rows: rows of the batch, all alike; sampling with guidance has two.
        scale: of the sides of frames.
    """

    cases: tuple[str, ...] = CASES
    heads: tuple[int, ...] = (24, 30)
    rivals: tuple[str, ...] = NAMES
    dim: int = 64
    rows: int = 1
    dtype: str = "bfloat16"
    scale: float = 1.0
    repeats: int = 10


REDUCED = Workload(
    ("384p stage 2 unit 8", "packed 16384"), (2,), NAMES, 16, 1, "float32", 1 / 8, 2
)


@dataclass(frozen=True)
class Measured:
    """One implementation on one case: milliseconds and TFLOP/s, or why there are none.

    `error` is the largest difference from the formula, as a share of the largest value.
    """

    error: float | None = None
    forward: Spread | None = None
    both: Spread | None = None
    rates: tuple[float, float] | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Row:
    """The measurements of all implementations on one case."""

    case: str
    heads: int
    tokens: int
    pairs: int
    measured: dict[str, Measured] = field(default_factory=dict)


def problem(work: Workload, name: str, heads: int) -> Problem:
    """Random numbers, rounded to the workload's dtype, under the mask of a case."""
    mask = TokenMask(*(np.repeat(x, work.rows, axis=0) for x in case(name, work.scale)))
    draw = np.random.default_rng(0)
    shape = (*mask.segment.shape, heads, work.dim)
    arrays = (draw.standard_normal(shape, np.float32) for _ in range(4))
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(work.dtype, np.float32)
    rounded = (x.astype(dtype).astype(np.float32) for x in arrays)
    return Problem(*rounded, mask, work.dtype)


def all_pairs(mask: TokenMask) -> int:
    """Pairs of a query and a key that it sees, in all rows."""
    return sum(map(visible_pairs, *mask))


def by_the_formula(
    problem: Problem, queries: Int[np.ndarray, "_"], mask: TokenMask
) -> list[Values]:
    """Outputs of some queries of every row, their gradients, those of k and of v.

    They are computed in float64, as if nothing came back to the other queries.
    """
    # perf: heads first, so that products of matrices do the work
    q, k, v, back = (np.moveaxis(x, 2, 1).astype(np.float64) for x in problem[:4])
    scale = q.shape[-1] ** -0.5
    q, back = q[:, :, queries], back[:, :, queries]
    (segment, frame), (own, now) = mask, (x[:, queries, None] for x in mask)
    sees = (segment[:, None] == own) & (own >= 0) & (frame[:, None] <= now)
    sees = sees[:, None]
    logits = np.where(sees, (q @ k.mT) * scale, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    change = back @ v.mT
    change = weights * (change - (change * weights).sum(-1, keepdims=True)) * scale
    found = weights @ v, change @ k, change.mT @ q, weights.mT @ back
    return [np.moveaxis(x, 1, 2) for x in found]


def errors(problem: Problem, one: Rival) -> dict[str, float]:
    """The largest differences from the formula, each as a share of the largest value.

    Of the values, and of the gradients of q, k and v.
    """
    valid = np.flatnonzero((problem.mask.segment >= 0).all(axis=0))
    sample = np.random.default_rng(0).permutation(valid)[:SAMPLED]
    back = np.zeros_like(problem.back)
    back[:, sample] = problem.back[:, sample]
    out, dq, dk, dv = map(one.take, one.both(*map(one.put, (*problem[:3], back))))
    computed = out[:, sample], dq[:, sample], dk, dv
    exact = by_the_formula(problem, sample, one.mask)
    pairs = zip(("values", "dq", "dk", "dv"), computed, exact, strict=True)
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, a, b in pairs}


def measure(work: Workload, name: str, heads: int) -> Row:
    """Measures all implementations on one case, in turns."""
    inputs = problem(work, name, heads)
    pairs = all_pairs(inputs.mask)
    measured = compare(work, inputs, pairs)
    return Row(name, heads, inputs.q.shape[1], pairs, measured)


def compare(work: Workload, inputs: Problem, pairs: int) -> dict[str, Measured]:
    """Measures the workload's implementations on one problem, in turns.

    Args:
        pairs: how many pairs of tokens are visible in it.
    """
    results: dict[str, Measured] = {}
    runs: dict[tuple[str, str], Any] = {}
    for title in work.rivals:
        results[title] = Measured()
        try:
            one = rival(title, inputs)
            share = float(np.max(list(errors(inputs, one).values())))
            results[title] = Measured(share)
            if not share <= ALLOWED[work.dtype]:
                raise ValueError(f"wrong by {share:.2g} of the largest value")
            runs |= {(title, what): run for what, run in _runs(inputs, one).items()}
        except Exception as reason:  # each library has its own kinds
            text = str(reason).strip() or type(reason).__name__
            results[title] = replace(results[title], skipped=text.splitlines()[0])
    times = interleaved({key: run for key, (run, _) in runs.items()}, work.repeats)
    for title in dict.fromkeys(title for title, _ in runs):
        forward, both = (
            spread([1e3 * t / runs[title, what][1] for t in times[title, what]])
            for what in ("forward", "both")
        )
        flop = 4 * pairs * inputs.q.shape[2] * inputs.q.shape[3]
        rates = flop / forward.median / 1e9, BOTH * flop / both.median / 1e9
        results[title] = replace(
            results[title], forward=forward, both=both, rates=rates
        )
    return results


def turn(
    call: Callable[[], Any], wait: Callable[[Any], Any]
) -> tuple[Callable[[], None], int]:
    """A run of as many calls as take `TURN` seconds, the last awaited; and how many."""
    wait(call())
    begin = time.perf_counter()
    wait(call())
    count = max(1, math.ceil(TURN / (time.perf_counter() - begin)))

    def run() -> None:
        for _ in range(count - 1):
            call()
        wait(call())

    return run, count


def heading(work: Workload) -> str:
    """What the numbers depend on."""
    system = environment(PACKAGES)
    return (
        f"{system['device']}, {work.dtype}, width {work.dim}, jax {system['jax']}, "
        f"torch {system['torch']}, tokamax {system['tokamax']}, load {system['load']}"
    )


def report(work: Workload, row: Row) -> str:
    """One case as a table for a terminal."""
    most, share = peak(jax.devices()[0].device_kind), row.pairs / row.tokens**2
    lines = [
        f"\n{row.case}, {work.rows} x {row.tokens} tokens, {row.heads} heads, "
        f"{share / work.rows:.0%} of the pairs are visible",
        f"  {'':14}{'forward, ms':28}TFLOP/s        {'both, ms':28}TFLOP/s",
    ]
    lines += [f"  {title:14}{_line(one, most)}" for title, one in row.measured.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, prints a table, writes JSON."""
    # PyTorch needs memory beside JAX, which keeps what it has once had.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="default all")
    parser.add_argument("--rivals", nargs="+", choices=NAMES, help="default all")
    parser.add_argument("--heads", nargs="+", type=int, help="default 24 30")
    parser.add_argument("--dim", type=int, help="width of a head, default 64")
    parser.add_argument("--rows", type=int, help="rows of the batch, default 1")
    parser.add_argument("--dtype", choices=ALLOWED, help="default bfloat16")
    parser.add_argument("--repeats", type=int, help="turns, default 10")
    parser.add_argument("--reduced", action="store_true", help="small shapes, float32")
    parser.add_argument("--to", type=Path, help="JSON file for the result")
    options = parser.parse_args(argv)
    work = REDUCED if options.reduced else Workload()
    if options.cases is not None:
        names = tuple(n for n in CASES for p in options.cases if fnmatch.fnmatch(n, p))
        if not names:
            parser.error(f"no case matches {options.cases}; the cases are {CASES}")
        work = replace(work, cases=names)
    for name in ("rivals", "heads", "dim", "rows", "dtype", "repeats"):
        value = getattr(options, name)
        if value is not None:
            value = tuple(value) if isinstance(value, list) else value
            work = replace(work, **{name: value})
    print(heading(work))
    rows: list[Row] = []
    for name, heads in itertools.product(work.cases, work.heads):
        rows.append(measure(work, name, heads))
        print(report(work, rows[-1]), flush=True)
        if options.to is not None:
            write(options.to, work, rows)


def write(path: Path, work: Workload, rows: Sequence[Row]) -> None:
    """Stores all measurements so far as JSON."""
    result = {"workload": work, "environment": environment(PACKAGES), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")


def _line(one: Measured, most: float | None) -> str:
    if one.forward is None or one.both is None or one.rates is None:
        return f"skipped: {one.skipped}"
    rates = [f"{rate:7.3g}" for rate in one.rates]
    if most is not None:
        rates = [f"{rate:5.1f} ({rate * 1e12 / most:.0%})" for rate in one.rates]
    return f"{one.forward!s:28}{rates[0]:15}{one.both!s:28}{rates[1]}"


def _runs(problem: Problem, one: Rival) -> dict[str, tuple[Callable[[], None], int]]:
    """What a turn runs, forward and both ways, and how many calls that is."""
    *arrays, back = map(one.put, problem[:4])
    calls = {
        "forward": functools.partial(one.forward, *arrays),
        "both": functools.partial(one.both, *arrays, back),
    }
    return {what: turn(call, one.wait) for what, call in calls.items()}


if __name__ == "__main__":
    main()
