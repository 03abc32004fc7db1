# SPDX-License-Identifier: Apache-2.0
"""What videos take by preset: counted arithmetic, predicted seconds, deviation.

    python -m benchmarks.speed
    python -m benchmarks.speed --measure

Arithmetic is that of the Euler steps of a released model, counted by `Case.flops`;
nothing runs. Seconds are predictions, the arithmetic at SHARE of an H200's peak, but
for those that `benchmarks.device` has measured. What the presets change is measured
with the embedded pixel model, in float32. The result is benchmarks/results/speed.json,
which the tables of docs/performance.md are made from. Published numbers are those of
the papers; sizes, models and hardware differ.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.device.records import chosen, read_records
from benchmarks.device.report import table
from benchmarks.video import RELEASED, Case, case
from pyramid_jax import flops
from pyramid_jax.model import PRESETS
from pyramid_jax.pipeline.folder import TINY
from pyramid_jax.pipeline.video import VideoPipeline, load

RESULT = Path(__file__).resolve().parent / "results" / "speed.json"
# Of the peak, what an H200 reached in the Euler steps of a 768p video of 5 seconds.
PEAK, SHARE = flops.PEAKS["NVIDIA H200"], 0.41
MEASURED = RESULT.parent / "device_h200.jsonl"
VARIANTS = {"mmdit": "SD3 style", "miniflux": "miniFLUX"}
VIDEOS = {name: name.replace("_", ", ").replace("s", " s") for name in RELEASED}
PROMPT, SEED = "a red circle moves left", 5
FIRST, LATER = 20, 10  # Euler steps of every stage


class Way(NamedTuple):
    """A way to sample: what differs from a `Case`, and prompts that are read at once.

    A student is asked once for each evaluation, without a negative prompt.
    """

    title: str
    changes: Mapping[str, Any]
    prompts: int = 2


def student(evaluations: int, title: str, **changes: Any) -> Way:
    """A student that takes so many steps in every stage, besides one left out."""
    steps = dict.fromkeys(("first_steps", "video_steps"), evaluations + 1)
    times = "evaluation" if evaluations == 1 else "evaluations"
    name = f"{title}, {evaluations} {times} per stage"
    return Way(name, {"last_step": False, **steps, **changes}, prompts=1)


WAYS: dict[str, Way] = {
    "without reuse": Way("`faithful`, without reuse", {"reuse": False}),
    **{name: Way(f"`{name}`", changes) for name, changes in PRESETS.items()},
    "clean history": Way(
        "`fast`, clean history", {**PRESETS["fast"], "clean_history": True}
    ),
    "student 2": student(2, "student"),
    "student 1": student(1, "student"),
    "clean student 2": student(2, "student, clean history", clean_history=True),
}


class Published(NamedTuple):
    """What others say about the speed of their models."""

    model: str
    size: str
    speed: str
    hardware: str
    source: str


PUBLISHED = (
    Published(
        "Pyramid Flow, the original", "384 x 640, 5 s", "56 s", "-", "arXiv:2410.05954"
    ),
    Published(
        "the same", "768 x 1280, 5 s", "330 s", "one A100", "README of its repository"
    ),
    Published(
        "the same", "768 x 1280, 5 s", "150 s", "4 A100", "README of its repository"
    ),
    Published(
        "Self Forcing 1.3B",
        "480 x 832",
        "17.0 frames/s",
        "one H100",
        "arXiv:2506.08009",
    ),
    Published(
        "Helios 14B", "384 x 640", "19.5 frames/s", "one H100", "arXiv:2603.04379"
    ),
    Published(
        "Hybrid Forcing", "480 x 832", "29.5 frames/s", "one H100", "arXiv:2604.10103"
    ),
    Published(
        "LongLive-2.0 5B",
        "720 x 1280",
        "45.7 frames/s",
        "Blackwell, in NVFP4",
        "arXiv:2605.18739",
    ),
)


def counted(of: Case, way: Way) -> float:
    """PFLOP of all Euler steps of a video."""
    return replace(of, **way.changes).flops() * way.prompts / 2 / 1e15


def all_counted(variant: str, videos: Sequence[str]) -> dict[str, dict[str, float]]:
    """PFLOP of all ways, by video."""
    cases = {name: case(name, variant) for name in videos}
    return {
        name: {video: round(counted(one, way), 3) for video, one in cases.items()}
        for name, way in WAYS.items()
    }


def deviations(pipeline: VideoPipeline) -> dict[str, dict[str, float]]:
    """How far a video of each preset is from that of `faithful`, without reuse.

    The largest difference of values in [-1, 1], and the PSNR in dB.
    """

    stages = len(pipeline.cfg.stages)

    def sampled(preset: str, reuse: bool) -> np.ndarray:
        options = replace(
            pipeline.defaults.with_preset(preset),
            first_steps=(FIRST,) * stages,
            video_steps=(LATER,) * stages,
            reuse=reuse,
        )
        return np.asarray(pipeline.latents(PROMPT, seed=SEED, options=options))

    exact, found = sampled("faithful", reuse=False), {}
    for preset in PRESETS:
        error = np.abs(sampled(preset, reuse=True) - exact).astype(np.float64)
        psnr = 10 * np.log10(4 / (error**2).mean())
        found[preset] = {"most": float(error.max()), "psnr": float(psnr)}
    return found


def speed_table() -> str:
    """PFLOP, predicted seconds and frames a second by preset, beside other models'."""
    pflop = json.loads(RESULT.read_text(encoding="utf-8"))["pflop"]
    rows = [
        [f"{VARIANTS[variant]}, {WAYS[name].title}", *map(_cell, videos.items())]
        for variant, ways in pflop.items()
        for name, videos in ways.items()
    ]
    rows.insert(2, ["the same, measured on an H200", *map(_measured, VIDEOS)])
    ours = table(("PFLOP; predicted s and frames/s", *VIDEOS.values()), rows)
    return f"{ours}\n\n{table(('published', *Published._fields[1:]), PUBLISHED)}"


def deviation_table() -> str:
    """How far the presets are from the original's numbers, step by step."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))["deviation"]
    rows = [
        [f"`{name}`", f"{one['most']:.1e}", f"{one['psnr']:.0f}"]
        for name, one in found.items()
    ]
    return table(("preset", "largest difference", "PSNR, dB"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Counts, measures if asked to, and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="deviations instead")
    args = parser.parse_args(argv)
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    if args.measure:
        result["deviation"] = deviations(load(TINY))
    else:
        result["pflop"] = {name: all_counted(name, tuple(VIDEOS)) for name in VARIANTS}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{speed_table()}\n\n{deviation_table()}")


def _measured(video: str) -> str:
    """The seconds of all Euler steps, where `benchmarks.device` has taken them."""
    units = chosen(read_records(MEASURED), "units", preset=video)
    if {one["units"] for one in units} != {"first", "later"}:
        return "not yet"
    pflop, seconds = (sum(one[name] for one in units) for name in ("flops", "seconds"))
    return f"{pflop / 1e15:.2f}; {seconds:.1f}, {RELEASED[video].frames / seconds:.0f}"


def _cell(of_video: tuple[str, float]) -> str:
    video, pflop = of_video
    seconds = pflop * 1e15 / PEAK / SHARE
    return f"{pflop:.2f}; {seconds:.1f}, {RELEASED[video].frames / seconds:.0f}"


if __name__ == "__main__":
    main()
