# SPDX-License-Identifier: Apache-2.0
"""Sampling one Euler step at a time, driven from the host.

The functions are those of `sampler.sample`. Here each step is the call of a compiled
function: a caller sees how far it is, gets every unit as soon as it exists, may stop at
any step, and learns at which step a number went bad. Neither the numbers of steps nor
guidance are compiled in.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int

from pyramid_jax import programs, sampler
from pyramid_jax.model import (
    ModelConfig,
    empty_memory,
    modulations,
    velocity_network,
)
from pyramid_jax.models.cache import Cache
from pyramid_jax.models.dit import Modulations
from pyramid_jax.noise import UnitNoise
from pyramid_jax.sampler import History
from pyramid_jax.shapes import Array, Text
from pyramid_jax.sharding import batch_shardings
from pyramid_jax.units import SamplerPlan, Unit


class Progress(NamedTuple):
    """An Euler step that has ended; units, stages and steps count from 0.

    `done` is the share of all work that is finished, in tokens that the network reads;
    `latents` are the unit's frames after the step, `videos frames h w c` at the
    resolution of the stage.
    """

    unit: int
    units: int
    stage: int
    stages: int
    step: int
    steps: int
    done: float
    latents: jax.Array

    def __str__(self):
        return (
            f"unit {self.unit + 1}/{self.units}, stage {self.stage + 1}/{self.stages}, "
            f"step {self.step + 1}/{self.steps}"
        )


StepCallback = Callable[[Progress], None]


def denoise(
    model: ModelConfig,
    params: Any,
    text: Text,
    shape: tuple[int, int, int, int],
    noise: UnitNoise,
    plan: SamplerPlan,
    *,
    scales: Float[np.ndarray, "units"] | None = None,
    first_frame: Float[Array, "videos _ h w c"] | None = None,
    mesh: Mesh | None = None,
    callback_on_step_end: StepCallback | None = None,
    finish: Callable[[jax.Array], jax.Array] = lambda latents: latents,
) -> Iterator[jax.Array]:
    """The latents of unit after unit, beginning with the first frame, given or not.

    The arguments are those of `sampler.sample`; `noise` is a pytree. A unit comes when
    the devices already have the first step of the next one.

    Args:
        mesh: devices that divide the videos among them; None: those of the weights.
        callback_on_step_end: is called after every Euler step.
        finish: what is made of a unit's latents, `videos _ h w c`, and yielded in their
            place; it follows the unit's last step, and the next unit does not wait.

    Raises:
        FloatingPointError: a step made numbers that are not finite.
    """
    units = _units(shape[0], plan, first_frame is not None)
    count, stages = 1 + units[-1][0].index if units else 1, len(plan.stages)
    shares = _shares(units, plan)
    videos = len(text.segment) // (1 + (scales is not None))
    video = jnp.zeros((videos, *shape), jnp.float32)
    mesh = mesh or _mesh_of(params)
    if mesh is not None:
        arrays = (text, noise, first_frame, video)
        arrays = jax.device_put(arrays, batch_shardings(arrays, mesh))
        text, noise, first_frame, video = arrays

    def report(progress: Progress, finite: Bool[jax.Array, ""]) -> None:
        """Waits for a step, checks it, and says that it has ended."""
        if not bool(finite):
            cause = _cause(params, text, model.dit.dtype)
            raise FloatingPointError(
                f"{progress}: the video is no longer finite; {cause}"
            )
        if callback_on_step_end is not None:
            callback_on_step_end(progress)

    made: list[jax.Array] = []  # what is yielded when the next unit has begun
    last: tuple[Progress, jax.Array] | None = None
    if first_frame is not None:
        frames = jnp.asarray(first_frame)
        video = _write_unit(video, frames.astype(jnp.float32), np.int32(0))
        made = [finish(frames)]
    known = _known_modulations(model, params, text, plan, units[:1] + units[-1:])
    memories = _Memories(plan, shape, text, {})
    for of_stages in units:
        index = np.int32(of_stages[0].index)
        scale = None if scales is None else np.float32(scales[index])
        x = video
        for k, unit in enumerate(of_stages):
            program = _Program(model, mesh, k, unit.slots)
            x, past = _start_stage(program, x, video, noise, index)
            sigmas, memory = plan.sigmas(k, unit), memories.of(program, unit, past)
            steps = zip(sigmas, known[unit.slots == 1, k], strict=True)
            for i, (pair, vectors) in enumerate(steps):
                conditions, at = (params, text, scale, vectors), i % len(memory)
                asked = program, conditions, x, past, pair, memory[at]
                with program.devices():
                    x, finite, memory[at] = _euler_step(*asked)
                past = past.known() if plan.reads_once(unit, k) else past
                if last is not None:  # perf: the device has the next step already
                    report(*last)
                while made:
                    yield made.pop()
                place = (int(index), count, k, stages, i, len(sigmas))
                last = Progress(*place, next(shares), x), finite
        video = _write_unit(video, x, index)
        made = [finish(x)]
    if last is not None:
        report(*last)
    yield from made


def _units(frames: int, plan: SamplerPlan, from_image: bool) -> list[tuple[Unit, ...]]:
    """The units to sample as each stage reads them, unit 0 if it is not given."""
    spans = [*([] if from_image else [(0, 1)]), *plan.spans(frames, from_image)]
    return [
        tuple(plan.unit(u, span, k, frames) for k in range(len(plan.stages)))
        for span in spans
        for u in range(*span)
    ]


def _known_modulations(
    model: ModelConfig,
    params: Any,
    text: Text,
    plan: SamplerPlan,
    units: list[tuple[Unit, ...]],
) -> dict[tuple[bool, int], list[Modulations]]:
    """What modulates all steps of a stage, of unit 0 (True) and of later ones."""
    return {
        (unit.slots == 1, k): [
            _modulations(model, k, params, text.pooled, sigma)
            for sigma, _ in plan.sigmas(k, unit)
        ]
        for of_stages in units
        for k, unit in enumerate(of_stages)
    }


def _shares(units: list[tuple[Unit, ...]], plan: SamplerPlan) -> Iterator[float]:
    """For every Euler step to come, the share of all work that ends with it."""
    work = []
    for of_stages in units:
        for k, unit in enumerate(of_stages):
            clips = unit.clips(k, plan.layout)
            sizes = [len(clip.frame) * 4**clip.stage for clip in clips]
            later = sizes[-1] if plan.reads_once(unit, k) else sum(sizes)
            work += [sum(sizes), *[later] * (len(plan.sigmas(k, unit)) - 1)]
    return iter((np.cumsum(work) / max(sum(work), 1)).tolist())


class _Program(NamedTuple):
    """What a step is compiled for: stage `stage` of units with so many slots."""

    model: ModelConfig
    mesh: Mesh | None
    stage: int
    slots: int | None

    def rows(self, tree: Any) -> Any:
        """Arrays whose rows the devices divide, if there is a mesh."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, batch_shardings(tree, self.mesh))

    def devices(self) -> AbstractContextManager[Any]:
        """Where networks divide their work among the devices, if there is a mesh."""
        if self.mesh is None:
            return nullcontext()
        return jax.set_mesh(self.mesh)


class _Memories(NamedTuple):
    """What the network remembers from unit to unit, by stages."""

    plan: SamplerPlan
    shape: tuple[int, int, int, int]
    text: Text
    lasting: dict[int, list[Any]]

    def of(self, program: _Program, unit: Unit, past: History) -> list[Any]:
        """One for each step of a stage, or one for all; None remembers nothing."""
        k = program.stage
        if k not in self.lasting:
            once = self.plan.reads_once(unit, k)
            begins = unit.index == self.plan.first_reading(k)
            room = self.plan.room(self.shape, k) if begins else 0
            size = room or once * sum(past.sizes)
            count = 1 if once else len(self.plan.sigmas(k, unit))
            made: list[Any] = [None] * count
            if size:
                with program.devices():
                    made = [_empty_memory(program, size, self.text) for _ in made]
            if not room:
                return made
            self.lasting[k] = made
        return self.lasting[k]


@partial(programs.kept, static=1)
def _start_stage(
    program: _Program,
    x: Float[jax.Array, "b _ _ _ c"],
    video: Float[jax.Array, "b t h w c"],
    noise: UnitNoise,
    index: Int[Array, ""],
) -> tuple[jax.Array, History]:
    """Where the stage of a unit starts, and what it sees."""
    model, _, k, slots = program
    cut = model.layout
    unit = Unit(index, slots, cut.unit_size(slots == 1, video.shape[1]))
    drawn = noise(index, unit.frames)
    x = sampler.start_stage(x, drawn, k, model.stages, model.gamma)
    past = sampler.history(video, unit, k, len(model.stages), cut)
    return program.rows(x), past._replace(tokens=program.rows(past.tokens))


@partial(programs.kept, static=2)
def _modulations(
    model: ModelConfig,
    stage: int,
    params: Any,
    pooled: Float[jax.Array, "b 1 pooled"],
    sigma: Float[Array, ""],
) -> Modulations:
    """What modulates the network in a step, the same for all units.

    perf: a third of the weights makes it; a step does not read them.
    """
    return modulations(model, params, pooled, stage, sigma)


@partial(programs.kept, static=2)
def _empty_memory(program: _Program, tokens: int, text: Text) -> Cache:
    """What the network remembers before the first unit of which it keeps anything."""
    return empty_memory(program.model, text, tokens)


@partial(programs.kept, static=1, donate=(5,))
def _euler_step(
    program: _Program,
    conditions: tuple[Any, Text, Float[Array, ""] | None, Modulations],
    x: Float[jax.Array, "_ t h w c"],
    past: History,
    sigmas: Float[Array, "2"],
    memory: Cache | None,
) -> tuple[Float[jax.Array, "_ t h w c"], Bool[jax.Array, ""], Cache | None]:
    """One Euler step, whether all of it is finite, and what is remembered of it."""
    model, stage = program.model, program.model.stages[program.stage]
    params, text, scale, vectors = conditions
    velocity = velocity_network(model, params, vectors)
    read = memory is not None and not past.tokens
    text = text.without_words() if program.slots is None or read else text
    step = partial(sampler.euler_step, velocity, text, x, past, sigmas, memory)
    x, memory = step(stage=stage, scale=scale, cut=model.layout)
    x = program.rows(x)
    return x, jnp.isfinite(x).all(), memory


_write_unit = programs.kept(sampler.write_unit)


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh that the weights are on, None if that is one device."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(where, NamedSharding) or where.mesh.size == 1:
        return None
    return cast(Mesh, where.mesh)


def _cause(params: Any, text: Text, dtype: str) -> str:
    """Where numbers that are not finite probably come from, and what to do."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"the weights {name} are not finite: convert or train them again"
    if not all(jnp.isfinite(x).all() for x in (text.features, text.pooled)):
        return "the features of a prompt are not finite: load text encoders in float32"
    return (
        f"weights and prompts are, so the network overflows in {dtype}: load the model "
        "in float32, or use less guidance"
    )
