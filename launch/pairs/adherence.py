# SPDX-License-Identifier: Apache-2.0
"""Measures a model of bouncing pairs: do its videos show what their captions say?

    python -m launch.pairs.adherence --model=runs/pairs/model --captions=200
    python -m launch.pairs.adherence --model=runs/pairs/model --frames=49
    python -m launch.pairs.adherence --model=runs/pairs/model --task=i2v

Captions are those of the held-out split. The judge looks at windows of 17 frames, the
last one at the end of the video. The table has 95 % intervals, the Fréchet distance to
real clips, and, as its floor, that of as many other real clips.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import UInt8

from launch import start
from launch.moving_shapes import wilson
from launch.pairs.dataset import Pair, pair
from launch.pairs.judge import clip_features, frechet, judge_pair
from launch.pairs.scene import Settings
from pyramid_jax.pipeline.video import load

WINDOW = 17  # frames that the judge sees at once
TASKS = ("t2v", "i2v", "t2i")

Clips = Sequence[UInt8[np.ndarray, "_ _ _ 3"]]


def main(options: flags.FlagValues) -> None:
    frames = 1 if options.task == "t2i" else options.frames
    asked = held_out(options.captions, options.seed, frames)
    model = load(options.model)
    videos = sampled(model, asked, options)
    real = [each.pixels for each in asked]
    others = [
        each.pixels for each in held_out(options.captions, options.seed + 1, frames)
    ]
    rows = {}
    for first, last in windows(frames):
        made, shown, floor = (
            [clip[first:last] for clip in clips] for clips in (videos, real, others)
        )
        reference = clip_features(floor)
        for name, clips in (("model", made), ("real", shown)):
            rows[f"{name}, frames {first} to {last - 1}"] = {
                "right": adherence(clips, asked, moving=frames > 1),
                "frechet": frechet(clip_features(clips), reference),
            }
    print(adherence_table(rows, len(asked)))
    if options.to:
        header = {"captions": len(asked), "seed": options.seed, "task": options.task}
        Path(options.to).write_text(json.dumps(header | {"rows": rows}, indent=1))


def held_out(count: int, seed: int, frames: int = WINDOW) -> list[Pair]:
    """Square held-out pairs, images if they have one frame."""
    kind = "image" if frames == 1 else "video"
    pairs, number = [], 0
    while len(pairs) < count:
        each = pair(number, seed, "held out", Settings(frames), kind)
        number += 1
        if each.pixels.shape[1] == each.pixels.shape[2]:
            pairs.append(each)
    return pairs


def sampled(
    model: Callable[..., Any], asked: Sequence[Pair], options: Any
) -> list[np.ndarray]:
    """A video of the model for every pair's caption, or also first frame (i2v)."""
    alone = options.task == "i2v"  # each has a first frame of its own
    batch = 1 if alone else options.batch
    videos = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        texts = [each.text for each in part]
        filled = (texts * batch)[:batch]
        videos += list(
            model(
                filled,
                num_frames=1 if options.task == "t2i" else options.frames,
                image=part[0].pixels[0] if alone else None,
                seed=options.seed + first,
                guidance_scale=options.guidance,
                video_guidance_scale=options.video_guidance,
                num_inference_steps=options.steps,
                video_num_inference_steps=options.video_steps,
            ).frames[: len(part)]
        )
    return videos


def windows(frames: int) -> list[tuple[int, int]]:
    """First and last frames (not included) of what the judge sees at once."""
    if frames <= WINDOW:
        return [(0, frames)]
    firsts = range(0, frames - WINDOW + 1, WINDOW - 1)
    return [(first, first + WINDOW) for first in firsts]


def adherence(clips: Clips, asked: Sequence[Pair], moving: bool) -> dict[str, int]:
    """How many clips show the right colours, kinds, motions, and all of them."""
    rows = [
        judge_pair(clip).right(each.actors)
        for clip, each in zip(clips, asked, strict=True)
    ]
    names = ["colours", "kinds", *["motions"] * moving]
    counts = {name: sum(row[name] for row in rows) for name in names}
    return counts | {"all": sum(all(row[name] for name in names) for row in rows)}


def adherence_table(rows: dict[str, dict], count: int) -> str:
    """The numbers as a Markdown table."""
    names = list(next(iter(rows.values()))["right"])
    lines = [f"| {count} captions | {' | '.join(names)} | Fréchet distance |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for title, row in rows.items():
        cells = []
        for name in names:
            low, high = wilson(row["right"][name], count)
            share = row["right"][name] / count
            cells.append(f"{share:.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"| {title} | {' | '.join(cells)} | {row['frechet']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of the model", required=True)
    flags.DEFINE_enum("task", "t2v", TASKS, "text to video, image to video, images")
    flags.DEFINE_integer("captions", 200, "how many to sample", lower_bound=2)
    flags.DEFINE_integer("frames", WINDOW, "of each video", lower_bound=1)
    flags.DEFINE_integer("batch", 20, "videos sampled together", lower_bound=1)
    flags.DEFINE_integer("steps", None, "of every stage, first frame")
    flags.DEFINE_integer("video_steps", None, "of every stage, later frames")
    flags.DEFINE_float("guidance", None, "of the first frame")
    flags.DEFINE_float("video_guidance", None, "of later frames")
    flags.DEFINE_integer("seed", 0, "of captions and videos")
    flags.DEFINE_string("to", None, "JSON file to write the numbers to")
    start.run(main)
