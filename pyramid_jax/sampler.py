# SPDX-License-Identifier: Apache-2.0
"""Sampling: units one after the other, each climbing the pyramid with its past in view.

The algorithm is a handful of functions: `start_stage`, `history`, `euler_step` and
`write_unit`. `sample` drives them as one program; `pyramid_jax/pipeline/denoise.py`
drives the same ones from the host. The network comes in as a function, so that the
algorithm can be tested with an exact velocity. `sample` traces it once per stage,
whatever the length of the video: units and Euler steps are scans, only stages (whose
shapes differ) are a Python loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pyramid_jax import layout, pyramid
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import AnyTokens, Array, Text, Tokens, Velocity

MOST_GUIDANCE = 100.0  # videos are noise long before


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = negative + scale · (positive - negative).

    Args:
        first, video: scale for the first frame and for later units.
        decay: if given, unit u uses max(first - decay·u, floor) for both instead.

    Raises:
        ValueError: a number below 0 or above `MOST_GUIDANCE`, or none at all (NaN).
    """

    first: float = 7.0
    video: float = 5.0
    decay: float | None = None
    floor: float = 2.0

    def __post_init__(self):
        for name in ("first", "video", "decay", "floor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_GUIDANCE:
                raise ValueError(
                    f"guidance {name}={value} must be 0 to {MOST_GUIDANCE:g}"
                )

    def scales(self, units: int) -> np.ndarray:
        """The scale of every unit."""
        if self.decay is not None:
            return np.maximum(self.first - self.decay * np.arange(units), self.floor)
        return np.array([self.first] + [self.video] * (units - 1), np.float64)


class Unit(NamedTuple):
    """One autoregressive step, the units for which there are slots, its own frames.

    `index` may be traced. A unit with one slot is unit 0, which has no history: the
    first frame, or a whole sequence.
    """

    index: int | Int[Array, ""]
    slots: int
    frames: int = 1

    def clips(self, stage: int, cut: Layout) -> tuple[Clip, ...]:
        """The frames that the unit sees at a stage, and last its own."""
        if self.slots == 1:
            return (layout.first_clip(stage, self.frames),)
        at = stage, self.index, self.slots
        return layout.clips(*at, cut.frames_per_unit, cut.history)


@dataclass(frozen=True)
class SamplerPlan:
    """How one model samples videos.

    Args:
        first_steps, video_steps: Euler steps of each stage, of unit 0 and of others.
        last_step: False leaves out each stage's last step, which is 0.001 wide.
        scans: the units are divided into so many scans, each with no more history slots
            than it needs: less padding, for as many more traces.

    Raises:
        ValueError: steps that are not one positive number for each stage, or no scan.
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

    def sigmas(self, stage: int, unit: Unit) -> Float[np.ndarray, "steps 2"]:
        """Sigma at the start and at the end of every Euler step of a stage."""
        steps = self.first_steps if unit.slots == 1 else self.video_steps
        sigmas = pyramid.sigmas(steps[stage], self.last_step)
        return np.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(np.float32)

    def spans(self, frames: int, given: bool = False) -> list[tuple[int, int]]:
        """The units after the first of a video of `frames`, as [begin, end) per scan.

        Scans have about equal numbers of units.

        Args:
            given: the first frame is not sampled.

        Raises:
            ValueError: the frames are not a whole number of units, or those of a model
                that can't continue a frame.
        """
        if given and self.layout.history == layout.NONE:
            raise ValueError(
                "this model makes all frames of a video at once (history 'none') and "
                "can't continue an image; give no first frame, or a model with history"
            )
        units = self.layout.units(frames)
        bounds = np.linspace(1, max(units, 1), self.scans + 1).round().astype(int)
        return [(int(a), int(b)) for a, b in pairwise(np.unique(bounds))]


# -------------------------------------------------------------------------------- noise


class Noise(NamedTuple):
    """The randomness of one unit: its start at stage 0, block noise for every jump."""

    start: Float[Array, "b _ _ _ c"]
    jumps: tuple[Float[Array, "b _ _ _ c"], ...]


# (unit, which may be traced; number of its frames) -> its noise
UnitNoise = Callable[[int | jax.Array, int], Noise]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys"],
    meta_fields=["frame", "stages", "gamma", "renoising"],
)
@dataclass(frozen=True)
class KeyedNoise:
    """Draws the noise of any unit from a key for each video.

    Each (unit, stage) has its own part of a video's key: neither the batch, nor the
    number of units, nor that of devices changes a video. A pytree, whose keys are plain
    numbers (`jax.random.key_data`), so that devices of other processes can hold them.

    Args:
        frame: (h, w, c) of a latent frame at the finest stage.
        stages, gamma: the number of stages, and their block noise's, see `pyramid`.
        renoising: what is added at a jump, see `pyramid.jump_noise`.
    """

    keys: Any  # `videos _`; in trees of shardings, the sharding of such an array
    frame: tuple[int, int, int]
    stages: int
    gamma: float = 1 / 3
    renoising: str = pyramid.CORRECTIVE

    def __call__(self, unit: int | Int[jax.Array, ""], frames: int) -> Noise:
        """The noise of one unit of so many frames."""
        keys = jax.random.wrap_key_data(jnp.asarray(self.keys))
        (h, w, c), last = self.frame, self.stages - 1

        def one(key: jax.Array, stage: int) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, unit), stage)
            shape = frames, h >> last - stage, w >> last - stage, c
            return jax.random.normal(key, shape, jnp.float32)

        white = [jax.vmap(partial(one, stage=k))(keys) for k in range(self.stages)]
        added = partial(pyramid.jump_noise, gamma=self.gamma, renoising=self.renoising)
        return Noise(white[0], tuple(added(z) for z in white[1:]))


# --------------------------------------------------------------- the pieces of sampling


class History(NamedTuple):
    """What stays the same in a stage: past tokens, and the indices of the frames."""

    tokens: list[AnyTokens]
    frame: Int[Array, "_"]


def start_stage(
    x: Float[jax.Array, "b _ _ _ c"],
    noise: Noise,
    k: int,
    stages: Sequence[Stage],
    gamma: float,
) -> Float[jax.Array, "b _ _ _ c"]:
    """Where stage `k` starts, from where the one below ended.

    Stage 0 starts from `noise.start`, whatever `x` is.
    """
    if k == 0:
        return noise.start
    return pyramid.jump(x, noise.jumps[k - 1], stages[k].start, gamma)


def history(
    video: Float[jax.Array, "b t h w c"],
    unit: Unit,
    k: int,
    stages: int,
    cut: Layout,
) -> History:
    """What a unit sees of the video so far at stage `k` of so many stages."""
    *past, current = unit.clips(k, cut)
    levels = pyramid.levels(video, stages)
    return History(layout.history_tokens(levels, past, k, cut), current.frame)


def euler_step(
    velocity: Velocity,
    text: Text,
    x: Float[jax.Array, "_ t h w c"],
    past: History,
    sigmas: Float[Array, "2"],
    *,
    stage: Stage,
    scale: Float[Array, ""] | None,
    cut: Layout,
) -> Float[jax.Array, "_ t h w c"]:
    """One Euler step of a stage, from sigma `sigmas[0]` to `sigmas[1]`."""
    time = pyramid.time(sigmas[0], stage)
    v = guided_velocity(velocity, text, x, past, time, scale=scale, cut=cut)
    return pyramid.euler(x, v, sigmas[0], sigmas[1])


def guided_velocity(
    velocity: Velocity,
    text: Text,
    x: Float[jax.Array, "_ t h w c"],
    past: History,
    time: Float[jax.Array, ""],
    *,
    scale: Float[Array, ""] | None,
    cut: Layout,
) -> Float[jax.Array, "_ t h w c"]:
    """The velocity of the frames `x`, with classifier-free guidance unless None."""
    grid = layout.grid(x, cut.patch)
    current = layout.tokens(x, past.frame, grid, cut)
    row = layout.join([*past.tokens, current])
    if scale is not None:
        row = Tokens(*(jnp.concatenate([part, part]) for part in row))
    time = jnp.full((row.values.shape[0], 1), time)
    v = velocity(row, time, text, x.shape[1] * grid[0] * grid[1])
    if scale is not None:
        negative, positive = jnp.split(v, 2)
        v = negative + scale * (positive - negative)
    return layout.unpatchify(v, grid, cut.patch)


def write_unit(
    video: Float[jax.Array, "b t h w c"],
    frames: Float[jax.Array, "b _ h w c"],
    unit: int | Int[Array, ""],
) -> Float[jax.Array, "b t h w c"]:
    """The video with the frames of a unit."""
    begin = jnp.maximum((unit - 1) * frames.shape[1] + 1, 0)
    return jax.lax.dynamic_update_slice_in_dim(video, frames, begin, axis=1)


# ----------------------------------------------------------------------- as one program


def sample(
    velocity: Velocity,
    text: Text,
    shape: tuple[int, int, int, int],
    noise: UnitNoise,
    plan: SamplerPlan,
    *,
    scales: Float[Array, "units"] | None = None,
    first_frame: Float[Array, "_ 1 h w c"] | None = None,
) -> Float[jax.Array, "_ t h w c"]:
    """The latents of a video for every prompt of `text`.

    Args:
        text: one segment per row; with guidance, the negative prompts' rows come first,
            then those of the prompts.
        shape: (t, h, w, c) of the latents of one video.
        scales: guidance of every unit, None for no guidance.
        first_frame: the given frame of image-to-video; None samples it, too.

    Source: paper section 3.3; the reference's `generate` and `generate_i2v`.
    """
    t, h, w, c = shape
    size_of, spans = plan.layout.unit_size, plan.spans(t, first_frame is not None)
    scales = None if scales is None else jnp.asarray(scales, jnp.float32)

    def sample_unit(video: jax.Array, unit: Unit) -> jax.Array:
        scale = None if scales is None else scales[unit.index]
        drawn = noise(unit.index, unit.frames)
        x = drawn.start
        for k, stage in enumerate(plan.stages):
            x = start_stage(x, drawn, k, plan.stages, plan.gamma)
            past = history(video, unit, k, len(plan.stages), plan.layout)
            step = partial(euler_step, velocity, text, stage=stage, scale=scale)
            x = _solve(partial(step, cut=plan.layout), x, past, plan.sigmas(k, unit))
        return x

    def sample_span(video: jax.Array, begin: int, end: int) -> jax.Array:
        def body(video: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            frames = sample_unit(video, Unit(index, end, size_of(False, t)))
            return write_unit(video, frames, index), None

        return jax.lax.scan(body, video, jnp.arange(begin, end))[0]

    if first_frame is None:
        rows = text.segment.shape[0] // (1 if scales is None else 2)
        empty = jnp.zeros((rows, 1, h, w, c), jnp.float32)
        first_frame = sample_unit(empty, Unit(0, 1, size_of(True, t)))
    rows, first = first_frame.shape[:2]
    later = jnp.zeros((rows, t - first, h, w, c), jnp.float32)
    video = jnp.concatenate([first_frame.astype(jnp.float32), later], axis=1)
    for begin, end in spans:
        video = sample_span(video, begin, end)
    return video


def _solve(
    step: Callable[..., jax.Array],
    x: Float[jax.Array, "b t h w c"],
    past: History,
    sigmas: Float[np.ndarray, "steps 2"],
) -> Float[jax.Array, "b t h w c"]:
    """All Euler steps of a stage as one scan."""

    def body(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        return step(x, past, pair), None

    return jax.lax.scan(body, x, jnp.asarray(sigmas))[0]
