# SPDX-License-Identifier: Apache-2.0
"""A whole video, from token ids to frames: seconds, memory, use of the chip.

python -m benchmarks.sample --preset 384p_5s
python -m benchmarks.sample --preset 768p_10s --variant miniflux --to result.json
python -m benchmarks.sample --loops --reference ~/Pyramid-Flow --clock cpu

The presets have the released sizes, with random weights in bfloat16 that are made on
the device: a GPU or TPU is needed, and no files. Without a preset a small model runs in
float32. `--reference` runs it beside the PyTorch original, in turns; that needs a
checkout of it, torch, diffusers and transformers. `--loops` compares sampling as one
program with a call per step.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import ours
from benchmarks.cpu_vs_reference import PACKAGES, Comparison
from benchmarks.reference_video import OriginalVideo
from benchmarks.stages import Run, Stage, by_stage, utilisation
from benchmarks.timing import (
    CLOCKS,
    Spread,
    environment,
    interleaved,
    plain,
    ratios,
    spread,
)
from benchmarks.video import PRESETS, SMALL, Case, case
from benchmarks.workload import Workload
from pyramid_jax.data.pixels import to_uint8
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline
from pyramid_jax.sharding import to_host
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.codec import Pieces

PROMPTS = ("a negative prompt", "a prompt")
GIB = 2**30
LOOPS = {
    "tiny": Workload(
        depth=2, width=64, heads=1, cells=(8, 8), caption=16, sampled=4, steps=4
    ),
    "small": case(SMALL).work,
}


@dataclass(frozen=True)
class Measured:
    """Seconds of a video and of its parts.

    `compiling` is what a first video took that had one step per stage. `flops` and
    `utilisation` are of the transformer, and of the time of its steps. Memory is in
    bytes; `peak` is None where the device does not tell.
    """

    compiling: float
    video: Spread
    text: Spread
    sampling: Spread
    decoding: Spread
    stages: list[Stage]
    flops: int
    utilisation: float | None
    weights: int
    peak: int | None


class Loop(NamedTuple):
    """Seconds of sampling as one program, and of a call per step.

    `per_step` is how much longer each step takes then.
    """

    program: Spread
    calls: Spread
    per_step: Spread


@dataclass(frozen=True)
class Result:
    """All that one call of this benchmark says."""

    preset: str
    variant: str
    size: Size
    dtype: str
    attention: str | None
    parameters: dict[str, int]
    clock: str
    environment: dict[str, Any]
    measured: Measured
    comparisons: dict[str, Comparison]
    loops: dict[str, Loop]


def measure(case: Case, repeats: int, clock: str = "wall") -> Measured:
    """Samples `repeats` videos, after one with a step per stage that compiles all.

    Args:
        clock: a key of `CLOCKS`.
    """
    now, ends = CLOCKS[clock], []
    model = case.model()
    jax.block_until_ready(case.loaded)

    def run(model: VideoPipeline) -> Run:
        ends.clear()
        began = now()
        model.run(
            case.request(model, PROMPTS[1]),
            callback_on_step_end=lambda progress: ends.append((progress, now())),
        )
        return Run(began, ends.copy(), now())

    one = (1,) * len(case.cfg.stages)
    once = replace(model.defaults, first_steps=one, video_steps=one)
    first = run(replace(model, defaults=once))
    words = {"text": lambda: encode(model)}
    text = spread(interleaved(words, repeats, clock)["text"])
    runs = [run(model) for _ in range(repeats)]
    stages = by_stage(case, runs, text.median)
    seconds = [r.steps[-1][1] - r.began - text.median for r in runs]
    count = sum(stage.flops for stage in stages)
    return Measured(
        compiling=first.ended - first.began,
        video=spread([r.ended - r.began for r in runs]),
        text=text,
        sampling=spread(seconds),
        decoding=spread([r.ended - r.steps[-1][1] for r in runs]),
        stages=stages,
        flops=count,
        utilisation=utilisation(case, count, float(np.median(seconds))),
        weights=sum(x.nbytes for x in jax.tree.leaves(case.loaded)),
        peak=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )


def encode(model: VideoPipeline) -> Any:
    """The text of a prompt and of a negative prompt."""
    assert model.prompts is not None
    return model.prompts(PROMPTS)


def beside(
    case: Case, path: Path, repeats: int, clock: str = "wall"
) -> dict[str, Comparison]:
    """The whole loop and its ends on both sides, in turns.

    Args:
        path: a checkout of the original.

    Raises:
        ValueError: see `OriginalVideo`.
    """
    original, model = OriginalVideo(path, case), case.model()
    request = case.request(model, PROMPTS[1])
    pairs = {
        "video": (lambda: model.run(request), original.video),
        "text encoders": (lambda: encode(model), original.text),
        "noise": (ours.noise(case.work), original.noise),
        "decoder": (decoding(case, model), original.decoding),
    }
    results = {}
    for name, (here, there) in pairs.items():
        times = interleaved({"jax": here, "reference": there()}, repeats, clock)
        results[name] = Comparison(
            spread(times["jax"]),
            spread(times["reference"]),
            ratios(times, "reference", "jax"),
        )
    return results


def decoding(case: Case, model: VideoPipeline) -> Callable[[], Any]:
    """Runs the decoder, from latents to 8-bit frames on the host."""
    assert model.vae is not None
    codec = autoencoder.vae_codec(model.vae)
    shape = (1, case.work.sampled, *case.work.cells, case.latent.channels)
    latents = jax.random.normal(jax.random.key(0), shape)
    pieces = Pieces(frames=2 * case.latent.temporal)
    return lambda: to_uint8(to_host(codec.decode(latents, pieces)))


def loops(repeats: int, clock: str = "wall") -> dict[str, Loop]:
    """What a call per step costs, for two sizes."""
    results = {}
    for name, work in LOOPS.items():
        runs = {"program": ours.sampling(work), "calls": ours.stepping(work)}
        times = interleaved(runs, repeats, clock)
        count = work.sampled * len(work.model.stages) * work.steps
        pairs = zip(times["calls"], times["program"], strict=True)
        extra = spread([(calls - program) / count for calls, program in pairs])
        results[name] = Loop(spread(times["program"]), spread(times["calls"]), extra)
    return results


def report(result: Result) -> str:
    """The result as tables for a terminal."""
    got, where, size = result.measured, result.environment, result.size
    weights = ", ".join(f"{n / 1e6:.0f} M {k}" for k, n in result.parameters.items())
    peak = "not told" if got.peak is None else f"{got.peak / GIB:.1f} GiB"
    lines = [
        f"{result.preset}, {result.variant}, {result.dtype}, attention "
        f"{result.attention or 'default'}: {size.frames} frames of {size.height} x "
        f"{size.width}; weights: {weights}",
        f"{where['device']}, {where['cpu']}, load {where['load']}, jax {where['jax']}, "
        f"commit {where['commit']}",
        "",
        f"{result.clock} seconds; compiling and one step per stage {got.compiling:.1f}",
        f"video     {got.video!s:32}{size.frames / got.video.median:.2f} frames/s",
        f"text      {got.text}",
        f"sampling  {got.sampling!s:32}{_rate(got.flops, got.sampling.median)}"
        f"{_percent(got.utilisation)}",
        f"decoding  {got.decoding}",
        f"memory: weights {got.weights / GIB:.1f} GiB, peak {peak}",
        "",
        f"{'units':8}{'stage':7}{'tokens':16}{'steps':7}{'a step':28}all steps",
    ]
    for s in got.stages:
        tokens = " to ".join(f"{n}" for n in dict.fromkeys(s.tokens))
        lines.append(
            f"{s.units:8}{s.stage:<7}{tokens:16}{s.steps:<7}{s.step!s:28}"
            f"{s.seconds:<9.3f}{_rate(s.flops, s.seconds)}{_percent(s.utilisation)}"
        )
    if result.comparisons:
        lines += ["", f"{'':16}{'this project':28}{'original':28}original / this"]
    for name, both in result.comparisons.items():
        lines.append(f"{name:16}{both.jax!s:28}{both.reference!s:28}{both.ratio}")
    if result.loops:
        lines += [
            "",
            f"{'':16}{'one program':28}{'a call per step':28}more per step, ms",
        ]
    for name, loop in result.loops.items():
        extra = Spread(*(1000 * seconds for seconds in loop.per_step))
        lines.append(f"{name:16}{loop.program!s:28}{loop.calls!s:28}{extra}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, variants = parser.add_argument, ("mmdit", "miniflux")
    add("--preset", choices=PRESETS, default=SMALL, help=f"default {SMALL}")
    add("--variant", choices=variants, default="mmdit", help="default mmdit")
    add("--attention", help="backend; default: that of the package")
    add("--scans", type=int, default=1, help="more: fewer empty slots; default 1")
    keep = argparse.BooleanOptionalAction
    add("--reuse", action=keep, default=True, help="of keys and values; default yes")
    add("--loops", action="store_true", help="one program against a call per step")
    add("--reference", type=Path, help="checkout of the original; small preset only")
    add("--repeats", type=int, default=3, help="default 3")
    add("--clock", choices=CLOCKS, default="wall", help="default wall")
    add("--to", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.reference is not None and args.preset != SMALL:
        parser.error(f"--reference runs on a CPU; leave out --preset {args.preset}")
    measured = replace(
        case(args.preset, args.variant),
        attention=args.attention,
        scans=args.scans,
        reuse=args.reuse,
    )
    how = (args.repeats, args.clock)
    result = Result(
        args.preset,
        args.variant,
        measured.size,
        measured.dtype,
        measured.attention,
        measured.parameters,
        args.clock,
        environment(PACKAGES),
        measure(measured, *how),
        beside(measured, args.reference, *how) if args.reference else {},
        loops(*how) if args.loops else {},
    )
    if args.to is not None:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        args.to.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")
    print(report(result))


def _rate(count: int, seconds: float) -> str:
    return f"{count / 1e12:.3g} TFLOP, {count / seconds / 1e12:.3g} TFLOP/s"


def _percent(part: float | None) -> str:
    return "" if part is None else f", {part:.1%} of the peak"


if __name__ == "__main__":
    main()
