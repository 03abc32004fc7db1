# SPDX-License-Identifier: Apache-2.0
"""Measures an embedded model: does a video show what its caption says?

    pyramid-jax evaluate --captions=200
    pyramid-jax evaluate --captions=200 --model=pyramid_jax/assets/tiny

Samples captions, lets the judge of launch/moving_shapes.py look at the videos, and
prints how often shape, colour and direction are right, with 95 % intervals, next to
real clips and to chance.
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import moving_shapes, start
from launch.moving_shapes import judge, wilson
from pyramid_jax.pipeline.folder import TINY_LATENT
from pyramid_jax.pipeline.request import SEEDS
from pyramid_jax.pipeline.video import VideoPipeline, load

ATTRIBUTES = ("shape", "colour", "direction")
CHANCE = {
    "shape": 1 / len(moving_shapes.SHAPES),
    "colour": 1 / len(moving_shapes.COLOURS),
    "direction": 1 / len(moving_shapes.DIRECTIONS),
}
CHANCE["all three"] = float(np.prod(list(CHANCE.values())))


def main(options: flags.FlagValues) -> None:
    if options.to:
        start.check_writable(Path(options.to).parent)
    captions = moving_shapes.captions()
    order = np.random.default_rng(options.seed).permutation(len(captions))
    selection = [captions[order[i % len(order)]] for i in range(options.captions)]

    model, seed = load(options.model), options.seed
    rows = {
        "model": score(
            selection, sampled(model, selection, options.batch, options.seed)
        ),
        "real clips": score(selection, drawn(selection, seed)),
    }
    print(table(rows, len(selection)))
    if options.to:
        device = jax.devices()[0].device_kind
        header = {"captions": len(selection), "seed": options.seed, "device": device}
        Path(options.to).write_text(
            json.dumps(header | {"right": rows}, indent=1) + "\n"
        )


def sampled(
    model: VideoPipeline,
    captions: list[moving_shapes.Caption],
    batch: int,
    seed: int,
) -> np.ndarray:
    """A video of the model for every caption; all batches have the same size."""
    frames = model.cfg.latent.longest(moving_shapes.Settings().frames)
    texts = [caption.text for caption in captions]
    videos = []
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        full = (part * batch)[:batch]
        sampled = model(full, num_frames=frames, seed=seed + first).frames
        videos.append(sampled[: len(part)])
    return np.concatenate(videos)


def drawn(captions: list[moving_shapes.Caption], seed: int = 0) -> list[np.ndarray]:
    """A real clip for every caption, none of the training data."""
    return [
        moving_shapes.small(
            moving_shapes.render(caption, np.random.default_rng((7, i, seed)))
        )
        for i, caption in enumerate(captions)
    ]


def score(captions: list[moving_shapes.Caption], videos) -> dict[str, int]:
    """How many videos show the right shape, colour, direction, and all three."""
    right = [
        [getattr(judge(video), name) == getattr(caption, name) for name in ATTRIBUTES]
        for caption, video in zip(captions, videos, strict=True)
    ]
    counts = np.sum(right, axis=0).tolist()
    return dict(zip(ATTRIBUTES, counts, strict=True)) | {
        "all three": int(np.all(right, axis=1).sum())
    }


def table(rows: dict[str, dict[str, int]], n: int) -> str:
    """The numbers as a Markdown table."""
    lines = [
        f"| {n} captions | {' | '.join(CHANCE)} |",
        "|---" * (len(CHANCE) + 1) + "|",
    ]
    for name, counts in rows.items():
        cells = []
        for key in CHANCE:
            low, high = wilson(counts[key], n)
            cells.append(f"{counts[key] / n:.1%} ({low:.1%} to {high:.1%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chance = " | ".join(f"{value:.1%}" for value in CHANCE.values())
    return "\n".join([*lines, f"| chance | {chance} |"])


if __name__ == "__main__":
    flags.DEFINE_string("model", str(TINY_LATENT), "Folder of the model.")
    flags.DEFINE_integer("captions", 200, "Captions to sample.", lower_bound=1)
    flags.DEFINE_integer("batch", 40, "Videos sampled together.", lower_bound=1)
    flags.DEFINE_integer(
        *("seed", 0, "Seed of the choice of captions, and of videos."),
        lower_bound=0,
        upper_bound=SEEDS - 1,
    )
    flags.DEFINE_string("to", None, "JSON file to write the numbers to.")
    start.run(main)
