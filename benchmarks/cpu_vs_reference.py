# SPDX-License-Identifier: Apache-2.0
"""Training and sampling on a CPU, alone or beside the PyTorch original.

python -m benchmarks.cpu_vs_reference
python -m benchmarks.cpu_vs_reference --variant miniflux --to result.json
python -m benchmarks.cpu_vs_reference --reference ~/Pyramid-Flow

The last command needs a checkout of the original and, in this environment, torch,
diffusers and transformers. Both sides then run the same shapes in turns. Weights are
fresh, products are float32, nothing is recomputed in the backward pass.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax

from benchmarks import ours
from benchmarks.reference import Original
from benchmarks.timing import (
    CLOCKS,
    Spread,
    Times,
    environment,
    interleaved,
    plain,
    ratios,
    spread,
)
from benchmarks.workload import Workload

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")
SIDE = 1024  # of the square matrices whose product gives the best rate
TRAINING, SAMPLING, SCANS = "training step", "sampling", "sampling, a scan per unit"
NOISE = "noise of the jumps"


@dataclass(frozen=True)
class Comparison:
    """Seconds of the same work on both sides; `ratio` is reference over jax."""

    jax: Spread
    reference: Spread | None = None
    ratio: Spread | None = None


@dataclass(frozen=True)
class Breakdown:
    """Where a training step of this project spends its seconds.

    `dense` and `attention` were measured alone, forward and back; `update` is the step
    without the gradient; `rest` is what remains: norms, modulation, rotation,
    activation, residuals. `floor` is how long the arithmetic takes at `rate`, the
    measured speed of a large matrix product in FLOP/s.
    """

    dense: float
    attention: float
    rest: float
    update: float
    dense_flops: int
    attention_flops: int
    rate: float
    floor: float


@dataclass(frozen=True)
class Result:
    """All that one call of this benchmark says."""

    workload: Workload
    tokens: tuple[int, int]
    visible_pairs: int
    clock: str
    parameters: int
    environment: dict[str, Any]
    comparisons: dict[str, Comparison]
    reference_noise: Spread | None
    breakdown: Breakdown

    def as_json(self) -> dict[str, Any]:
        """The result as JSON stores it, spreads as objects."""
        return plain(self)


def measure(
    work: Workload, repeats: int, clock: str = "wall", reference: Path | None = None
) -> Result:
    """Runs a workload `repeats` times on each side, in turns.

    Args:
        clock: a key of `CLOCKS`.
        reference: a checkout of the original; None measures this project alone.

    Raises:
        ValueError: see `Original`.
    """
    alone = {TRAINING: ours.training(work), SAMPLING: ours.sampling(work)}
    if work.sampled > 2:  # otherwise one scan is all there is
        alone[SCANS] = ours.sampling(work, scans=work.sampled - 1)
    theirs = {}
    if reference is not None:
        original = Original.load(reference, work)
        theirs = {
            TRAINING: original.training(),
            SAMPLING: original.sampling(),
            NOISE: original.jump_noise(),
        }
    training = {"jax": alone.pop(TRAINING), "gradient": ours.gradient(work)}
    steps = interleaved(training | _named(theirs, TRAINING), repeats, clock)
    samples = interleaved(alone | _named(theirs, SAMPLING, NOISE), repeats, clock)
    comparisons = {TRAINING: _comparison(steps, "jax", TRAINING)}
    for name in alone:
        comparisons[name] = _comparison(samples, name, SAMPLING)
    noise = samples.get(_theirs(NOISE))
    return Result(
        work,
        work.tokens,
        work.pairs,
        clock,
        work.parameters,
        environment(PACKAGES),
        comparisons,
        spread(noise) if noise else None,
        _breakdown(work, steps, repeats, clock),
    )


def report(result: Result) -> str:
    """The result as a table for a terminal."""
    work, where, parts = result.workload, result.environment, result.breakdown
    m, n = result.tokens
    lines = [
        f"{work.variant}: {work.depth} blocks of width {work.width}, "
        f"{result.parameters / 1e6:.1f} M weights, {m} text and {n} video tokens",
        f"{where['cpu']}, {where['threads']} threads, load {where['load']}, "
        f"jax {where['jax']}, torch {where['torch']}, commit {where['commit']}",
        "",
        f"{f'{result.clock} seconds':28}{'this project':26}{'original':26}ratio",
    ]
    for name, both in result.comparisons.items():
        cells = [f"{cell or ''!s:26}" for cell in (both.jax, both.reference)]
        lines.append(f"{name:28}{cells[0]}{cells[1]}{both.ratio or ''}")
    if result.reference_noise is not None:
        lines.append(f"{'  of it, ' + NOISE:54}{result.reference_noise}")
    flops = parts.dense_flops + parts.attention_flops
    lines += [
        "",
        f"step: dense products {parts.dense:.3f}, attention {parts.attention:.3f}, "
        f"rest {parts.rest:.3f}, update {parts.update:.3f}",
        f"floor: {flops / 1e9:.0f} GFLOP at {parts.rate / 1e9:.0f} GFLOP/s take "
        f"{parts.floor:.3f}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Workload):
        several = isinstance(field.default, tuple)
        kind = type(field.default[0] if several else field.default)
        count = {"nargs": len(field.default)} if several else {}
        parser.add_argument(
            f"--{field.name}",
            type=kind,
            default=field.default,
            help=f"default {field.default}",
            **count,
        )
    parser.add_argument("--reference", type=Path, help="checkout of the original")
    parser.add_argument("--repeats", type=int, default=9, help="default 9")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default wall")
    parser.add_argument("--to", type=Path, help="JSON file for the result")
    arguments = vars(parser.parse_args(argv))
    options = ("repeats", "clock", "reference", "to")
    *how, to = (arguments.pop(name) for name in options)
    jax.config.update("jax_platforms", "cpu")
    work = Workload(**arguments | {"cells": tuple(arguments["cells"])})
    result = measure(work, *how)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    print(report(result))


def _breakdown(work: Workload, steps: Times, repeats: int, clock: str) -> Breakdown:
    runs = {"attention": ours.attentions(work), "square": ours.multiply(SIDE)}
    counts = work.products()
    times = interleaved(runs | ours.products(work), repeats, clock)
    seconds = {name: spread(values).median for name, values in times.items()}
    dense = sum(seconds[product] * count for product, count in counts.items())
    attention = work.depth * seconds["attention"]
    step, gradient = (spread(steps[name]).median for name in ("jax", "gradient"))
    # Each product of a forward pass has two more of its size in the backward pass.
    dense_flops = 3 * sum(product.flops * count for product, count in counts.items())
    attention_flops = 3 * 4 * work.pairs * work.width * work.depth
    rate = 2 * SIDE**3 / seconds["square"]
    return Breakdown(
        dense=dense,
        attention=attention,
        rest=gradient - dense - attention,
        update=step - gradient,
        dense_flops=dense_flops,
        attention_flops=attention_flops,
        rate=rate,
        floor=(dense_flops + attention_flops) / rate,
    )


def _comparison(times: Times, name: str, theirs: str) -> Comparison:
    theirs = _theirs(theirs)
    if theirs not in times:
        return Comparison(spread(times[name]))
    ratio = ratios(times, over=theirs, under=name)
    return Comparison(spread(times[name]), spread(times[theirs]), ratio)


def _named(runs: dict[str, ours.Run], *names: str) -> dict[str, ours.Run]:
    return {_theirs(name): runs[name] for name in names if name in runs}


def _theirs(name: str) -> str:
    return f"original: {name}"


if __name__ == "__main__":
    main()
