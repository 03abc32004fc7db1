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
from pyramid_jax.noise import Noise, UnitNoise
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import AnyTokens, Array, Text, Tokens, Velocity


class Unit(NamedTuple):
    """One autoregressive step, the units for which there are slots, its own frames.

    `index` may be traced. A unit with one slot is unit 0, which has no history: the
    first frame, or a whole sequence. Without slots, the network remembers what the unit
    before has seen at stage 0.
    """

    index: int | Int[Array, ""]
    slots: int | None
    frames: int = 1

    def clips(self, stage: int, cut: Layout) -> tuple[Clip, ...]:
        """The frames that the unit reads at a stage, and last its own."""
        if self.slots is None:
            return layout.recent_clips(stage, self.index, cut.frames_per_unit)
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
        reuse: the stages at which the network remembers text and what it has seen at
            stage 0, from unit to unit: the same numbers, for memory.
        clean_history: what the network makes of text and history does not depend on the
            step, so that stages with reuse read them once in a unit.
        window: how many units a unit sees at most, the first one and the newest, as if
            there had been no others; None: all. A video that is longer reuses nothing.
        begin: how many units are given, if any are.

    Raises:
        ValueError: steps that are not one positive number for each stage, no scan, no
            window, or reuse at a stage that does not exist.
    """

    stages: tuple[Stage, ...] = field(default_factory=pyramid.stages)
    layout: Layout = field(default_factory=Layout)
    first_steps: tuple[int, ...] = (20, 20, 20)
    video_steps: tuple[int, ...] = (10, 10, 10)
    gamma: float = 1 / 3
    last_step: bool = True
    scans: int = 1
    reuse: tuple[int, ...] = ()
    clean_history: bool = False
    window: int | None = None
    begin: int = 1

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
        for name in ("scans", "window", "begin"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        if not set(self.reuse) <= set(range(len(self.stages))):
            raise ValueError(
                f"reuse={self.reuse} must name stages, of 0 to {len(self.stages) - 1}"
            )

    def sigmas(self, stage: int, unit: Unit) -> Float[np.ndarray, "steps 2"]:
        """Sigma at the start and at the end of every Euler step of a stage."""
        steps = self.first_steps if unit.slots == 1 else self.video_steps
        sigmas = pyramid.sigmas(steps[stage], self.last_step)
        return np.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(np.float32)

    def spans(self, frames: int, given: bool = False) -> list[tuple[int, int]]:
        """The units of a video of `frames` to sample after those that are given.

        They come as [begin, end) per scan; unit 0 is not among them.

        Units that come before all stages remember are alone. Other scans have about
        equal numbers of units.

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
        units = max(1, self.layout.units(frames))
        remembering = [k for k in self.reuse if self.remembered(frames, k)]
        known = max(map(self.first_reading, remembering), default=self.begin - 1) + 1
        bounds = np.linspace(known, units, self.scans + 1).round().astype(int)
        bounds = np.unique([*range(self.begin, known), *bounds])
        return [(int(a), int(b)) for a, b in pairwise(bounds)]

    def remembered(self, frames: int, stage: int) -> int:
        """How many frames a stage has to remember in a video of so many, 0 for none."""
        units = self.layout.units(frames)
        if stage not in self.reuse or self.layout.history != layout.PYRAMID:
            return 0
        if self.window is not None and self.window < units - 1:
            return 0  # what a unit sees does not begin as before
        if self.first_reading(stage) > units - 2:
            return 0
        return 1 + (units - stage - 3) * self.layout.frames_per_unit

    def first_reading(self, stage: int) -> int:
        """The unit that reads frame 0 at stage 0 first, to be remembered by a stage."""
        return max(stage + 1, self.begin)

    def room(self, shape: tuple[int, int, int, int], stage: int) -> int:
        """How many video tokens that is, of latents (t, h, w, c), 0 for none.

        A history that is read once in a unit has room besides, as long as it lasts.
        """
        frames = self.remembered(shape[0], stage)
        if frames and self.clean_history:
            levels = sum(4**level for level in range(stage + 1))
            frames += self.layout.frames_per_unit * levels
        cells = shape[1] * shape[2] // 4 ** (len(self.stages) - 1)
        return frames * cells // self.layout.patch**2

    def reads_once(self, unit: Unit, stage: int) -> bool:
        """Whether only the first step of a stage reads the unit's history."""
        return self.clean_history and stage in self.reuse and unit.slots != 1

    def unit(
        self,
        index: int | Int[Array, ""],
        span: tuple[int, int],
        stage: int,
        frames: int,
    ) -> Unit:
        """A unit of a span of `spans`, as a stage reads it in a video of `frames`.

        It remembers after `first_reading`.
        """
        begin, end = span
        known = begin > self.first_reading(stage) and self.remembered(frames, stage) > 0
        size = self.layout.unit_size(begin == 0, frames)
        slots = end if self.window is None else min(end, 1 + self.window)
        return Unit(index, None if known else slots, size)


# --------------------------------------------------------------- the pieces of sampling


class History(NamedTuple):
    """What stays the same in a stage: past tokens, and the indices of the frames."""

    tokens: list[AnyTokens]
    frame: Int[Array, "_"]

    @property
    def sizes(self) -> list[int]:
        """How many tokens each clip has."""
        return [clip[0].shape[1] for clip in self.tokens]

    def known(self) -> "History":
        """What is left of it for a network that has read it."""
        return self._replace(tokens=[])


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
    video, unit = _in_view(video, unit, cut)
    *past, current = unit.clips(k, cut)
    levels = pyramid.levels(video, stages)
    return History(layout.history_tokens(levels, past, k, cut), current.frame)


def _in_view(
    video: Float[jax.Array, "b t h w c"], unit: Unit, cut: Layout
) -> tuple[Float[jax.Array, "b _ h w c"], Unit]:
    """Frame 0 and the newest frames, where a unit has no slots for others."""
    slots, size = unit.slots, cut.frames_per_unit
    if slots in (None, 1) or video.shape[1] <= 1 + (slots - 1) * size:
        return video, unit
    index = jnp.minimum(unit.index, slots - 1)
    begin = 1 + (unit.index - index) * size
    newest = jax.lax.dynamic_slice_in_dim(video, begin, (slots - 1) * size, axis=1)
    return jnp.concatenate([video[:, :1], newest], 1), unit._replace(index=index)


def euler_step(
    velocity: Velocity,
    text: Text,
    x: Float[jax.Array, "_ t h w c"],
    past: History,
    sigmas: Float[Array, "2"],
    memory: Any = None,
    *,
    stage: Stage,
    scale: Float[Array, ""] | None,
    cut: Layout,
) -> tuple[Float[jax.Array, "_ t h w c"], Any]:
    """One Euler step of a stage, from sigma `sigmas[0]` to `sigmas[1]`.

    Args:
        memory: what the network remembers of this step from earlier units, None if it
            does not; it is returned with the oldest clip of the past. Where the history
            is read once, that of all steps of the stage.
        scale: of classifier-free guidance, None for none.
    """
    grid = layout.grid(x, cut.patch)
    current = layout.tokens(x, past.frame, grid, cut)
    row = layout.join([*past.tokens, current])
    if scale is not None:
        row = Tokens(*(jnp.concatenate([part, part]) for part in row))
    time = jnp.full((row.values.shape[0], 1), pyramid.time(sigmas[0], stage))
    asked = row, time, text, x.shape[1] * grid[0] * grid[1]
    if memory is None:
        v = velocity(*asked)
    else:
        v, memory = velocity(*asked, memory, sum(past.sizes[:1]))
    if scale is not None:
        negative, positive = jnp.split(v, 2)
        v = negative + scale * (positive - negative)
    v = layout.unpatchify(v, grid, cut.patch)
    return pyramid.euler(x, v, sigmas[0], sigmas[1]), memory


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
    first_frame: Float[Array, "_ _ h w c"] | None = None,
    memory: Callable[[int], Any] | None = None,
) -> Float[jax.Array, "_ t h w c"]:
    """The latents of a video for every prompt of `text`.

    Args:
        text: one segment per row; with guidance, the negative prompts' rows come first,
            then those of the prompts.
        shape: (t, h, w, c) of the latents of one video.
        scales: guidance of every unit, None for no guidance.
        first_frame: the given frame of image-to-video, or those of `plan.begin` units;
            None samples it, too.
        memory: for stages that reuse: what the network remembers before it has read
            anything, from the number of tokens that there will be.

    Source: paper section 3.3; the reference's `generate` and `generate_i2v`.

    Raises:
        ValueError: stages reuse, and there is no memory.
    """
    if plan.reuse and memory is None:
        raise ValueError(f"reuse={plan.reuse} needs a memory, see `empty_memory`")
    t, h, w, c = shape
    spans, stages = plan.spans(t, first_frame is not None), plan.stages
    scales = None if scales is None else jnp.asarray(scales, jnp.float32)

    def sample_unit(
        state: tuple[jax.Array, Sequence[Any]], index: Any, span: tuple[int, int]
    ) -> tuple[jax.Array, Sequence[Any]]:
        scale = None if scales is None else scales[index]
        drawn = noise(index, plan.layout.unit_size(span[0] == 0, t))
        memories = list(state[1])
        x = drawn.start
        for k, stage in enumerate(stages):
            unit = plan.unit(index, span, k, t)
            x = start_stage(x, drawn, k, stages, plan.gamma)
            past = history(state[0], unit, k, len(stages), plan.layout)
            words = text if unit.slots is not None else text.without_words()
            step = partial(euler_step, velocity, stage=stage, scale=scale)
            step, sigmas = partial(step, cut=plan.layout), plan.sigmas(k, unit)
            if plan.reads_once(unit, k):
                assert memory is not None
                lasts = memories[k] is not None
                seen = memories[k] if lasts else memory(sum(past.sizes))
                x, seen = _solve_at_once(step, words, x, past, sigmas, seen)
                memories[k] = seen if lasts else None
            else:
                step = partial(step, words)
                x, memories[k] = _solve(step, x, past, sigmas, memories[k])
        return x, memories

    def sample_span(state: Any, span: tuple[int, int]) -> Any:
        def body(state: Any, index: jax.Array) -> tuple[Any, None]:
            frames, memories = sample_unit(state, index, span)
            return (write_unit(state[0], frames, index), memories), None

        return jax.lax.scan(body, state, jnp.arange(*span))[0]

    memories: list[Any] = [None] * len(stages)
    if first_frame is None:
        rows = text.segment.shape[0] // (1 if scales is None else 2)
        blank = jnp.zeros((rows, 1, h, w, c), jnp.float32)
        first_frame, _ = sample_unit((blank, memories), 0, (0, 1))
    rows, first = first_frame.shape[:2]
    later = jnp.zeros((rows, t - first, h, w, c), jnp.float32)
    video = jnp.concatenate([first_frame.astype(jnp.float32), later], axis=1)
    for span in spans:
        for k in range(len(stages)):
            if span[0] == plan.first_reading(k) and (tokens := plan.room(shape, k)):
                assert memory is not None
                each = [memory(tokens)] * len(plan.sigmas(k, Unit(*span)))
                stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
                memories[k] = each[0] if plan.clean_history else stacked
        video, memories = sample_span((video, memories), span)
    return video


def _solve(
    step: Callable[..., tuple[jax.Array, Any]],
    x: Float[jax.Array, "b t h w c"],
    past: History,
    sigmas: Float[np.ndarray, "steps 2"],
    memory: Any,
) -> tuple[Float[jax.Array, "b t h w c"], Any]:
    """All Euler steps of a stage as one scan, with what each of them remembers."""

    def body(state: tuple[jax.Array, Any], at: Any) -> tuple[Any, None]:
        (x, memory), (i, pair) = state, at
        # perf: written where it is; as a result of the scan it would exist twice.
        read = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        x, of_step = step(x, past, pair, jax.tree.map(read, memory))
        return (x, jax.tree.map(write, memory, of_step)), None

    places = jnp.arange(len(sigmas)), jnp.asarray(sigmas)
    return jax.lax.scan(body, (x, memory), places)[0]


def _solve_at_once(
    step: Callable[..., tuple[jax.Array, Any]],
    text: Text,
    x: Float[jax.Array, "b t h w c"],
    past: History,
    sigmas: Float[np.ndarray, "steps 2"],
    memory: Any,
) -> tuple[Float[jax.Array, "b t h w c"], Any]:
    """The same where the first step reads text and history for all of them."""
    pairs = jnp.asarray(sigmas)
    x, memory = step(text, x, past, pairs[0], memory)

    def body(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        return step(text.without_words(), x, past.known(), pair, memory)[0], None

    return jax.lax.scan(body, x, pairs[1:])[0], memory
