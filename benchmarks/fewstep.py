# SPDX-License-Identifier: Apache-2.0
"""A teacher and its student at few steps: what their videos still show, and how soon.

python -m benchmarks.fewstep --teacher=pyramid_jax/assets/pairs \\
    --student=runs/student/model --to=runs/fewstep.json --plot=runs/fewstep.png

The teacher is sampled with its guidance at its own steps and at 4, 2 and 1 evaluations
of each stage, the student without guidance at 2 and 1; all from the same noise. Beside
how many captions are wholly right stand the share of those that the teacher gets right
at its own steps (95 %, by a bootstrap over captions in pairs), processor seconds of a
video, and the distance of the videos to the teacher's (root mean square, as a share of
theirs). `--student` may be a file of adapters, or left out.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.ablations.measures import Interval, interval
from benchmarks.device.report import table
from benchmarks.timing import environment, plain
from launch.evaluate.judges import JUDGES, Asked, Judge
from launch.evaluate.reports import write_report
from launch.moving_shapes import wilson
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.video import VideoPipeline, load

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
TEACHER, STUDENT = (4, 2, 1), (2, 1)  # evaluations of a stage
UNGUIDED = Guidance(first=0.0, video=0.0)
BATCH, RESAMPLES = 20, 2000


class Point(NamedTuple):
    """One way to sample, and what came of it for every caption.

    Args:
        evaluations: of the network by a unit, second branches of guidance included;
            those of the first unit, where they are other ones, are not counted.
        seconds: of the processor for a video, compiling left out.
        right: whether all that the caption names is right.
        distance: to the teacher's videos at its own steps.
    """

    name: str
    evaluations: int
    seconds: float
    right: np.ndarray
    distance: float

    def kept(self, teacher: "Point") -> Interval:
        """The share of the teacher's right captions, and its interval."""
        rng, count = np.random.default_rng(0), len(self.right)
        drawn = (rng.integers(count, size=count) for _ in range(RESAMPLES))
        shares = [self._share(teacher, chosen) for chosen in drawn]
        return interval(self._share(teacher, np.arange(count)), np.array(shares))

    def _share(self, teacher: "Point", chosen: np.ndarray) -> float:
        return float(self.right[chosen].sum() / max(teacher.right[chosen].sum(), 1))


def main(argv: Sequence[str] | None = None) -> None:
    """Samples, judges, prints the table, and writes JSON and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="folder of a model")
    parser.add_argument("--student", help="folder of its student, or adapters")
    parser.add_argument("--judge", choices=JUDGES, default="pairs")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--to", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args(argv)
    judge, teacher = JUDGES[options.judge], load(options.teacher)
    frames = teacher.cfg.latent.longest(judge.frames)
    asked = judge.ask(options.captions, options.seed, frames, False)
    student = None
    if options.student:
        added = options.student.endswith(".safetensors")
        folder = options.teacher if added else options.student
        student = load(folder, lora={options.student: 1.0} if added else {})
    found = list(points(teacher, student, judge, asked, options.seed))
    result = {
        "environment": environment(PACKAGES),
        "captions": len(asked),
        "seed": options.seed,
        "points": [plain(row(point, found[0])) for point in found],
    }
    print(points_table(result))
    if options.to:
        write_report(options.to, result)
    if options.plot:
        plot(result).savefig(options.plot, dpi=110, metadata={"Software": None})


def points(
    teacher: VideoPipeline,
    student: VideoPipeline | None,
    judge: Judge,
    asked: Sequence[Asked],
    seed: int,
) -> Iterator[Point]:
    """Every way to sample; the teacher at its own steps comes first."""
    exact = None
    for name, model, sample in ways(teacher, student):
        videos, seconds = sampled(model, sample, asked, seed)
        rights = [
            judge.right(judge.see(video), each.expected)
            for video, each in zip(videos, asked, strict=True)
        ]
        exact = videos if exact is None else exact
        distance = np.linalg.norm(videos - exact) / np.linalg.norm(exact)
        right = np.array([all(right.values()) for right in rights])
        yield Point(name, evaluations(sample), seconds, right, float(distance))


def ways(
    teacher: VideoPipeline, student: VideoPipeline | None
) -> Iterator[tuple[str, VideoPipeline, SampleConfig]]:
    """Models, and how to sample them."""
    yield "teacher, its own steps", teacher, teacher.defaults
    for count in TEACHER:
        yield f"teacher, {count} a stage", teacher, few(teacher.defaults, count)
    for count in STUDENT if student else ():
        unguided = replace(student.defaults, guidance=UNGUIDED)
        yield f"student, {count} a stage", student, few(unguided, count)


def few(sample: SampleConfig, count: int) -> SampleConfig:
    """So many evaluations of each stage: the step of 0.001 is left out."""
    steps = (count + 1,) * len(sample.first_steps)
    return replace(sample, first_steps=steps, video_steps=steps, last_step=False)


def evaluations(sample: SampleConfig) -> int:
    """How often a unit after the first one calls the network."""
    steps = sum(sample.video_steps) - (not sample.last_step) * len(sample.video_steps)
    return steps * (2 if sample.guidance.video > 0 else 1)


def sampled(
    model: VideoPipeline, sample: SampleConfig, asked: Sequence[Asked], seed: int
) -> tuple[np.ndarray, float]:
    """A video for every caption, with seeds that count up, and seconds of a video."""
    videos, times = [], []
    batch = min(BATCH, len(asked))
    frames = len(asked[0].real)
    for first in range(0, len(asked), batch):
        texts = [each.text for each in asked[first : first + batch]]
        request = model.request(
            (texts * batch)[:batch],
            num_frames=frames,
            seed=seed + first,
            options=sample,
        )
        begun = time.process_time()
        videos += list(model.run(request).frames[: len(texts)])
        times.append((time.process_time() - begun) / batch)
    return np.stack(videos).astype(np.float32), float(np.median(times[1:] or times))


def row(point: Point, teacher: Point) -> dict[str, Any]:
    """A point as it is stored."""
    right, count = int(point.right.sum()), len(point.right)
    return {
        "name": point.name,
        "evaluations": point.evaluations,
        "seconds": point.seconds,
        "right": right,
        "interval": wilson(right, count),
        "kept": point.kept(teacher),
        "distance": point.distance,
    }


def points_table(result: dict[str, Any]) -> str:
    """The points as a Markdown table."""
    rows = []
    for point in result["points"]:
        low, high = point["interval"]
        kept = point["kept"]
        rows.append(
            [
                point["name"],
                str(point["evaluations"]),
                f"{point['right'] / result['captions']:.1%} ({low:.1%} to {high:.1%})",
                f"{kept['value']:.1%} ({kept['low']:.1%} to {kept['high']:.1%})",
                f"{point['distance']:.3f}",
                f"{point['seconds']:.2f}",
            ]
        )
    head = ("", "evaluations of a unit", f"{result['captions']} captions, all right")
    return table((*head, "of the teacher's", "distance", "seconds"), rows)


def plot(result: dict[str, Any]) -> Figure:
    """Right captions over evaluations, and over seconds."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in ((left, "evaluations"), (right, "seconds")):
        for who in ("teacher", "student"):
            chosen = [p for p in result["points"] if p["name"].startswith(who)]
            if not chosen:
                continue
            chosen.sort(key=lambda point: point[name])
            share = np.array([p["right"] for p in chosen]) / result["captions"]
            bounds = np.array([p["interval"] for p in chosen]).T
            spread = np.abs(bounds - share)
            at = [p[name] for p in chosen]
            axes.errorbar(at, share, spread, fmt="o-", capsize=3, label=who)
        axes.set(xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    left.set(xlabel="evaluations of the network by a unit", ylabel="captions right")
    right.set(xlabel="processor seconds of a video")
    left.legend()
    made = result["environment"]
    figure.suptitle(f"{made['commit']}, {made['date']}, {made['device']}", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
