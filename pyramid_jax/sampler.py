# SPDX-License-Identifier: Apache-2.0
"""Sampling: units one after the other, each climbing the pyramid with its past in view.

The network comes in as a function, so that the algorithm can be tested with an exact
velocity. It is traced once per stage, whatever the length of the video: units and Euler
steps are scans, only stages (whose shapes differ) are a Python loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pyramid_jax import layout, pyramid
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import AnyTokens, Array, Text, Tokens, Velocity


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = negative + scale · (positive - negative).

    Args:
        first, video: scale for the first frame and for later units.
        decay: if given, unit u uses max(first - decay·u, floor) for both instead.
    """

    first: float = 7.0
    video: float = 5.0
    decay: float | None = None
    floor: float = 2.0

    def scales(self, units: int) -> np.ndarray:
        """The scale of every unit."""
        if self.decay is not None:
            return np.maximum(self.first - self.decay * np.arange(units), self.floor)
        return np.array([self.first] + [self.video] * (units - 1), np.float64)


class Turn(NamedTuple):
    """Which unit it is, which may be traced, and for how many units slots are kept.

    A turn with one slot is that of unit 0, the first frame, which has no history.
    """

    unit: int | Int[jax.Array, ""]
    slots: int


@dataclass(frozen=True)
class SamplerConfig:
    """How a video is sampled.

    Args:
        first_steps, video_steps: Euler steps of each stage, of unit 0 and of others.
        last_step: False leaves out each stage's last step, which is 0.001 wide.
        scans: the units are divided into so many scans, each with no more history slots
            than it needs: less padding, for as many more traces.
    """

    stages: tuple[Stage, ...] = field(default_factory=pyramid.stages)
    layout: Layout = field(default_factory=Layout)
    first_steps: tuple[int, ...] = (20, 20, 20)
    video_steps: tuple[int, ...] = (10, 10, 10)
    gamma: float = 1 / 3
    last_step: bool = True
    scans: int = 1

    def __post_init__(self):
        for name in ("first_steps", "video_steps"):
            steps = getattr(self, name)
            if len(steps) != len(self.stages):
                raise ValueError(
                    f"{name}={steps} must have one entry for each of the "
                    f"{len(self.stages)} stages"
                )
            for count in steps:
                pyramid.sigmas(count, self.last_step)  # raises
        if self.scans < 1:
            raise ValueError(f"scans={self.scans} must be 1 or more")

    def times(self, stage: int, turn: Turn) -> Float[np.ndarray, "steps 2"]:
        """Sigma at the start and at the end of every Euler step of a stage."""
        steps = self.first_steps if turn.slots == 1 else self.video_steps
        sigmas = pyramid.sigmas(steps[stage], self.last_step)
        return np.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(np.float32)

    def clips(self, stage: int, turn: Turn) -> tuple[Clip, ...]:
        """The frames that a unit sees at a stage, and its own."""
        per_unit = 1 if turn.slots == 1 else self.layout.frames_per_unit
        return layout.clips(stage, turn.unit, turn.slots, per_unit)


class Noise(NamedTuple):
    """The randomness of one unit: its start at stage 0, block noise for every jump."""

    start: Float[jax.Array, "b _ _ _ c"]
    jumps: tuple[Float[jax.Array, "b _ _ _ c"], ...]


def draw(
    keys: jax.Array,
    unit: int | Int[jax.Array, ""],
    shape: Sequence[int],
    cfg: SamplerConfig,
) -> Noise:
    """The noise of one unit of `shape` = (t, h, w, c) at the finest stage.

    Each video of the batch has its own key and each (unit, stage) its own part of it:
    neither the batch, nor the number of units, nor that of devices changes a video.
    """
    t, h, w, c = shape
    last = len(cfg.stages) - 1

    def one(key: jax.Array, stage: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, unit), stage)
        return jax.random.normal(key, (t, h >> last - stage, w >> last - stage, c))

    white = [jax.vmap(partial(one, stage=k))(keys) for k in range(last + 1)]
    return Noise(white[0], tuple(pyramid.block_noise(z, cfg.gamma) for z in white[1:]))


class Canvas(NamedTuple):
    """What a video is made from.

    `shape` is (t, h, w, c) of its latents; `noise` maps a unit (which may be traced)
    and its number of frames to its noise, e.g. by `draw`; `first` is the given first
    frame of image-to-video, None generates it.
    """

    shape: tuple[int, int, int, int]
    noise: Callable[[int | jax.Array, int], Noise]
    first: Float[Array, "_ 1 h w c"] | None = None


def sample(
    velocity: Velocity,
    text: Text,
    canvas: Canvas,
    scales: Float[Array, "units"] | None,
    cfg: SamplerConfig,
) -> Float[jax.Array, "_ t h w c"]:
    """The latents of a video for every prompt of `text`.

    Args:
        text: one segment per row; with guidance, the negative prompts' rows come first,
            then those of the prompts.
        scales: guidance of every unit, None for no guidance.

    Source: paper section 3.3; the reference's `generate` and `generate_i2v`.
    """
    t, h, w, c = canvas.shape
    per_unit = cfg.layout.frames_per_unit
    climb = Climb(velocity, text, cfg)
    scales = None if scales is None else jnp.asarray(scales, jnp.float32)
    first = canvas.first
    if first is None:
        noise = canvas.noise(0, 1)
        nothing = jnp.zeros((noise.start.shape[0], 1, h, w, c))
        first = climb(nothing, Turn(0, 1), noise, None if scales is None else scales[0])

    later = jnp.zeros((first.shape[0], t - 1, h, w, c))
    video = jnp.concatenate([first.astype(jnp.float32), later], axis=1)
    for begin, end in spans(layout.units(t, per_unit), cfg.scans):

        def body(
            video: jax.Array, unit: jax.Array, slots: int = end
        ) -> tuple[jax.Array, None]:
            scale = None if scales is None else scales[unit]
            new = climb(video, Turn(unit, slots), canvas.noise(unit, per_unit), scale)
            return put(video, new, unit), None

        video, _ = jax.lax.scan(body, video, jnp.arange(begin, end))
    return video


def put(
    video: Float[jax.Array, "b t h w c"],
    new: Float[jax.Array, "b _ h w c"],
    unit: int | Int[jax.Array, ""],
) -> Float[jax.Array, "b t h w c"]:
    """The video with the frames of one unit, which is not unit 0."""
    at = (unit - 1) * new.shape[1] + 1
    return jax.lax.dynamic_update_slice_in_dim(video, new, at, axis=1)


def spans(units: int, scans: int) -> list[tuple[int, int]]:
    """Units 1 .. units - 1 in `scans` runs of about equal length."""
    bounds = np.unique(np.linspace(1, max(units, 1), scans + 1).round().astype(int))
    return [(int(a), int(b)) for a, b in pairwise(bounds)]


class View(NamedTuple):
    """What stays the same while a stage is climbed: the history, and the frames."""

    seen: list[AnyTokens]
    frame: Int[Array, "_"]


def enter(
    stage: int,
    x: Float[jax.Array, "b _ _ _ c"],
    video: Float[jax.Array, "b t h w c"],
    turn: Turn,
    noise: Noise,
    cfg: SamplerConfig,
) -> tuple[Float[jax.Array, "b _ _ _ c"], View]:
    """Where a stage starts, from where the one below ended, and what it sees.

    Stage 0 starts from `noise.start`, whatever `x` is.
    """
    if stage == 0:
        x = noise.start
    else:
        start = cfg.stages[stage].start
        x = pyramid.jump(x, noise.jumps[stage - 1], start, cfg.gamma)
    *past, current = cfg.clips(stage, turn)
    levels = pyramid.levels(video, len(cfg.stages))
    return x, View(layout.history(levels, past, stage, cfg.layout), current.frame)


@dataclass(frozen=True)
class Climb:
    """One autoregressive step: noise to the clean frames of a unit, given the past."""

    velocity: Velocity
    text: Text
    cfg: SamplerConfig

    def __call__(
        self,
        video: Float[jax.Array, "b t h w c"],
        turn: Turn,
        noise: Noise,
        scale: Float[jax.Array, ""] | None,
    ) -> Float[jax.Array, "b _ h w c"]:
        x = noise.start
        for k in range(len(self.cfg.stages)):
            x, view = enter(k, x, video, turn, noise, self.cfg)

            def euler(
                x: jax.Array, at: jax.Array, k: int = k, view: View = view
            ) -> tuple[jax.Array, None]:
                return self.step(k, x, view, at, scale), None

            x, _ = jax.lax.scan(euler, x, jnp.asarray(self.cfg.times(k, turn)))
        return x

    def step(
        self,
        k: int,
        x: Float[jax.Array, "b t h w c"],
        view: View,
        at: Float[Array, "2"],
        scale: Float[jax.Array, ""] | None,
    ) -> Float[jax.Array, "b t h w c"]:
        """One Euler step of stage k, from sigma `at[0]` to `at[1]`."""
        time = pyramid.time(at[0], self.cfg.stages[k])
        return pyramid.euler(x, self.guided(x, view, time, scale), at[0], at[1])

    def guided(
        self,
        x: Float[jax.Array, "b t h w c"],
        view: View,
        time: Float[jax.Array, ""],
        scale: Float[jax.Array, ""] | None,
    ) -> Float[jax.Array, "b t h w c"]:
        """The velocity of the frames `x`, with classifier-free guidance."""
        patch = self.cfg.layout.patch
        grid = layout.grid(x, patch)
        current = layout.tokens(x, view.frame, grid, self.cfg.layout)
        row = layout.join([*view.seen, current])
        if scale is not None:
            row = Tokens(*(jnp.concatenate([part, part]) for part in row))
        time = jnp.full((row.values.shape[0], 1), time)
        v = self.velocity(row, time, self.text)
        v = v[:, -x.shape[1] * grid[0] * grid[1] :]
        if scale is not None:
            negative, positive = jnp.split(v, 2)
            v = negative + scale * (positive - negative)
        return layout.unpatchify(v, grid, patch)
