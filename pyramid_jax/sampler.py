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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pyramid_jax import layout, pyramid
from pyramid_jax.layout import Layout
from pyramid_jax.noise import Noise, UnitNoise
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import AnyTokens, Array, Text, Tokens, Velocity
from pyramid_jax.units import SamplerPlan, Unit


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
