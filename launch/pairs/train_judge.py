# SPDX-License-Identifier: Apache-2.0
"""Trains the judge of bouncing pairs, on drawn frames with noise and blur.

    python -m launch.pairs.train_judge --to=runs/judge

The weights that ship with the package are those of the defaults, as they were at step
1500, after six minutes of a CPU core.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from scipy import ndimage

from launch import start
from launch.pairs.dataset import pair
from launch.pairs.judge import JudgeNet, judge_pair
from launch.pairs.scene import COLOURS, KINDS, Scene, Split, scene
from pyramid_jax.checkpoint import files

_FRAMES = 17  # of a film
_TAKEN = 4  # frames taken from each film
_NOISE = 12  # most, deviation in values of 255
_SIDE = 64  # frames are cut to squares


class Examples(NamedTuple):
    """Frames, and of each colour the kind (-1: absent) and the place of the object."""

    pixels: np.ndarray
    kind: np.ndarray
    place: np.ndarray


def examples(scenes: int, seed: int, split: Split = "training") -> Examples:
    """Some frames of many scenes that are not those of the data set."""
    parts = []
    for number in range(scenes):
        rng = np.random.default_rng((seed, number))
        shown = scene(number, seed, split)
        times = np.sort(rng.choice(_FRAMES, _TAKEN, replace=False)).tolist()
        film = shown.film(times[-1] + 1)[times]
        left = int(rng.integers(shown.size[1] - _SIDE + 1))
        kind, place = zip(*(labels(shown, time, left) for time in times), strict=True)
        film = film[:, :, left : left + _SIDE]
        parts.append((film, np.stack(kind), np.stack(place)))
    return Examples(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def labels(shown: Scene, time: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """Kinds and places of all colours in a frame that begins at column `left`."""
    kinds = np.full(len(COLOURS), -1, np.int32)
    places = np.zeros((len(COLOURS), 2), np.float32)
    for actor, path, mask in zip(shown.actors, shown.paths, shown.masks, strict=True):
        centre = path.place(time) + (len(mask) / 4 - 1) / 2 - (0, left)
        if 0 <= centre[1] < _SIDE:
            colour = list(COLOURS).index(actor.colour)
            kinds[colour], places[colour] = KINDS.index(actor.kind), centre
    return kinds, places


def damaged(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames in [-1, 1] with noise and blur, as a model might make them."""
    x = frames.astype(np.float32)
    if rng.random() < 0.5:
        x = ndimage.gaussian_filter(x, (0, *[rng.uniform(0, 1.0)] * 2, 0))
    x = x * rng.uniform(0.85, 1.1, (len(x), 1, 1, 1))
    x = x + rng.uniform(0, _NOISE) * rng.normal(size=x.shape)
    return (x / 127.5 - 1).clip(-1, 1).astype(np.float32)


def judge_loss(params: Any, batch: Examples) -> tuple[jax.Array, jax.Array]:
    """How wrong the judge is about presence, kinds and places; and its hit rate."""
    sight: Any = JudgeNet().apply({"params": params}, batch.pixels)
    there = (batch.kind >= 0).astype(jnp.float32)
    presence = optax.sigmoid_binary_cross_entropy(sight.present, there).mean()
    kinds = optax.softmax_cross_entropy_with_integer_labels(
        sight.kind, jnp.maximum(batch.kind, 0)
    )
    off = jnp.abs(sight.place - batch.place).mean(axis=-1)
    hits = (sight.kind.argmax(-1) == batch.kind) * there
    total = there.sum()
    loss = presence * 3 + (there * (kinds + 0.2 * off)).sum() / total
    return loss, hits.sum() / total


def train(options: flags.FlagValues) -> Any:
    """The weights of a trained judge."""
    data = examples(options.scenes, seed=options.seed + 100)
    rates = optax.cosine_decay_schedule(3e-3, options.steps)
    optimizer = optax.adamw(rates, weight_decay=1e-3)
    frame = jnp.zeros((1, _SIDE, _SIDE, 3), jnp.float32)
    params = JudgeNet().init(jax.random.key(options.seed), frame)["params"]
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Examples):
        gradient = jax.value_and_grad(judge_loss, has_aux=True)
        (loss, hits), slope = gradient(params, batch)
        updates, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, updates), state, loss, hits

    rng = np.random.default_rng(options.seed)
    for i in range(options.steps):
        chosen = rng.integers(len(data.pixels), size=options.batch)
        pixels = damaged(data.pixels[chosen], rng)
        batch = Examples(pixels, data.kind[chosen], data.place[chosen])
        params, state, loss, hits = step(params, state, batch)
        if i % 50 == 0 or i == options.steps - 1:
            logging.info("step %d: loss %.3f, kinds %.3f", i, loss, hits)
            files.write_weights(Path(options.to), jax.tree.map(np.asarray, params))
    return params


def measured(params: Any, clips: int) -> dict[str, float]:
    """How often the judge is right about held-out clips."""
    drawn = [pair(i, 0, "held out", kind="video") for i in range(clips)]
    rows = [judge_pair(each.pixels, params).right(each.actors) for each in drawn]
    rates = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return rates | {"all": float(np.mean([all(row.values()) for row in rows]))}


def main(options: flags.FlagValues) -> None:
    Path(options.to).mkdir(parents=True, exist_ok=True)
    params = train(options)
    print(json.dumps(measured(params, options.clips)))


if __name__ == "__main__":
    flags.DEFINE_string("to", None, "folder to write the weights to", required=True)
    flags.DEFINE_integer("scenes", 5000, "scenes to learn from", lower_bound=1)
    flags.DEFINE_integer("steps", 2500, "steps", lower_bound=1)
    flags.DEFINE_integer("batch", 48, "frames of a step", lower_bound=1)
    flags.DEFINE_integer("clips", 200, "held-out clips to judge", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of everything that is random")
    start.run(main)
