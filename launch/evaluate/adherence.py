# SPDX-License-Identifier: Apache-2.0
"""Do videos of an embedded model show what their captions say?

The judge looks at windows of a video, the last one at its end. Beside the model stand
real clips, and chance: real clips of other captions. Fréchet distances are those to
other real clips, so that the row of real clips is their floor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch import start
from launch.evaluate.distances import frechet
from launch.evaluate.judges import JUDGES, Asked, Judge
from launch.evaluate.metrics import Clip
from launch.evaluate.reports import write_report
from launch.moving_shapes import wilson
from launch.sample import choices
from launch.sizes import check_trained, height_width
from pyramid_jax.pipeline.sizes import nearest_frames
from pyramid_jax.pipeline.video import VideoPipeline

TASKS = ("t2v", "i2v", "t2i")
BATCH = 20  # videos sampled together, unless it is given


def evaluate_adherence(options: flags.FlagValues) -> None:
    """Samples captions, prints what is right, and writes it as JSON.

    Raises:
        ValueError: what the model can't make, or no folder to write to.
    """
    choices.check_choices(options)
    if options.to:
        start.check_writable(Path(options.to).parent)
    model = choices.chosen_model(options)
    judge = JUDGES[options.judge]
    frames = frames_of(model, judge, options)
    height, width = height_width(options.size) if options.size else (1, 1)
    ask = options.captions, options.seed, frames, width > height
    asked = judge.ask(*ask)
    videos = sampled(model, asked, frames, options)
    others = judge.ask(ask[0], options.seed + 1, *ask[2:])
    rows = compared(judge, videos, asked, others)
    print(adherence_table(rows, len(asked)))
    if options.to:
        header = {
            **{name: options[name].value for name in ("judge", "task", "seed")},
            "captions": len(asked),
            "frames": frames,
            "device": jax.devices()[0].device_kind,
        }
        write_report(options.to, header | {"rows": rows})


def frames_of(model: VideoPipeline, judge: Judge, options: Any) -> int:
    """Frames of the videos, by flags or as many as the judge's clips have."""
    if options.task == "t2i":
        return 1
    if options.seconds is not None:
        return nearest_frames(options.seconds, model.cfg, model.defaults)
    return options.frames or model.cfg.latent.longest(judge.frames)


def sampled(
    model: VideoPipeline, asked: Sequence[Asked], frames: int, options: Any
) -> list[Clip]:
    """A video for every caption, or for every caption and first frame (i2v).

    All batches have the same size.
    """
    alone = options.task == "i2v"  # each has a first frame of its own
    batch = 1 if alone else options.batch or BATCH
    height, width = height_width(options.size) if options.size else (None, None)
    videos: list[Clip] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        texts = [each.text for each in part]
        request = model.request(
            (texts * batch)[:batch],
            negative_prompt=options.negative,
            image=part[0].real[0] if alone else None,
            height=height,
            width=width,
            num_frames=frames,
            seed=options.seed + first,
            options=choices.options(model, options, alone),
        )
        if not options.any_size:
            check_trained(model.defaults, request.size, model.name)
        videos += list(model.run(request).frames[: len(part)])
    return videos


def compared(
    judge: Judge, videos: Sequence[Clip], asked: Sequence[Asked], others: list[Asked]
) -> dict[str, dict[str, Any]]:
    """What is right in every window of the videos, of real clips, and by chance."""
    rows: dict[str, dict[str, Any]] = {}
    real = [each.real for each in asked]
    for first, last in windows(len(videos[0]), judge.frames):
        made, shown, rest = (
            [clip[first:last] for clip in clips]
            for clips in (videos, real, [each.real for each in others])
        )
        place = (
            f", frames {first} to {last - 1}" if len(videos[0]) > judge.frames else ""
        )
        for name, clips in (("model", made), ("real clips", shown)):
            row: dict[str, Any] = {"right": adherence(judge, clips, asked)}
            rows[name + place] = row
            if judge.features is not None:
                features = judge.features(clips), judge.features(rest)
                row["frechet"] = frechet(*features)
    turned = [*asked[1:], *asked[:1]]
    first, last = windows(len(videos[0]), judge.frames)[0]
    shown = [clip[first:last] for clip in real]
    return rows | {"chance": {"right": adherence(judge, shown, turned)}}


def windows(frames: int, window: int) -> list[tuple[int, int]]:
    """First and last frames (not included) of what a judge sees at once."""
    if frames <= window:
        return [(0, frames)]
    firsts = range(0, frames - window + 1, window - 1)
    return [(first, first + window) for first in firsts]


def adherence(
    judge: Judge, clips: Sequence[Clip], asked: Sequence[Asked]
) -> dict[str, int]:
    """How many clips show each thing that their captions name, and all of them."""
    counts = {}
    for clip, each in zip(clips, asked, strict=True):
        right = judge.right(judge.see(clip), each.expected)
        if len(clip) == 1:
            del right[judge.motion]
        for name, value in (right | {"all": all(right.values())}).items():
            counts[name] = counts.get(name, 0) + int(value)
    return counts


def adherence_table(rows: dict[str, dict[str, Any]], count: int) -> str:
    """The numbers as a Markdown table, with 95 % intervals."""
    names = list(next(iter(rows.values()))["right"])
    far = any("frechet" in row for row in rows.values())
    head = [f"{count} captions", *names, *["Fréchet distance"] * far]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, row in rows.items():
        cells = [title]
        for name in names:
            low, high = wilson(row["right"][name], count)
            cells.append(f"{row['right'][name] / count:.1%} ({low:.1%} to {high:.1%})")
        if far:
            cells.append(f"{row['frechet']:.3f}" if "frechet" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
