# SPDX-License-Identifier: Apache-2.0
"""Euler steps that several GPUs take together, compiled: what they send each other.

A step is that of a later unit of a 768p video of five seconds, with guidance, and with
keys and values that are reused. Devices divide the two rows of guidance over `data`,
tokens over `context`, heads and the MLP over `tensor`. Its efficiency is predicted, as
`launch/compile/plan.py` does it: the seconds that one device would take, over those
that all of these take together, when exchanges cost what no work beside them hides.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.compile.chips import GPU, TPU
from launch.compile.kernels import Line
from launch.compile.machines import Machine, machine
from launch.compile.plan import cost, sending
from launch.compile.program import Program, collective
from launch.compile.step import CELLS, CHANNELS, WORDS
from pyramid_jax import flops, layout, programs, sharding
from pyramid_jax.kernels.tiles import tiles_for
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import VARIANTS, ModelConfig, empty_memory, initialise
from pyramid_jax.models.cache import AXES
from pyramid_jax.models.dit import STACKED
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline import denoise
from pyramid_jax.shapes import Text
from pyramid_jax.units import SamplerPlan

SHAPE = (16, *CELLS, CHANNELS)  # latents of five seconds
MIB = 2**20


class SharedStep(NamedTuple):
    """A step of a stage, and how devices divide it; `least` is its efficiency.

    Unrolled, every block has weights of its own, which nothing copies out of a stack.
    """

    name: str
    stage: int
    mesh: Mapping[str, int]
    least: float
    unrolled: bool = False


class Cost(NamedTuple):
    """Predicted seconds of a step on one of its devices, and what it exchanges."""

    busy: float
    waited: float  # for exchanges
    bytes: float
    count: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.busy + self.waited


SIZES = (
    SharedStep("768p stage 2 data 2 context 2", 2, {"data": 2, "context": 2}, 0.93),
    SharedStep("768p stage 1 data 2 context 2", 1, {"data": 2, "context": 2}, 0.81),
    SharedStep("768p stage 1 unrolled", 1, {"data": 2, "context": 2}, 0.87, True),
)


def compiled(chip: GPU | TPU, size: SharedStep) -> Iterator[Line]:
    """Compiles the step for one device and for all; a line with its efficiency."""
    if not isinstance(chip, GPU):
        return
    kind, count = chip.name.lower(), math.prod(size.mesh.values())
    try:
        alone = step(machine(f"{kind}x1"), size.stage, {}, size.unrolled)
        there = machine(f"{kind}x{count}")
        shared = step(there, size.stage, size.mesh, size.unrolled)
    except Exception as error:  # each compiler has its own kinds
        yield Line(chip.name, size.name, refusal=str(error).split("\n")[0][:300])
        return
    found = alone.seconds / count / shared.seconds
    used = (
        f"{found:.1%} efficient: {1e3 * alone.seconds:.1f} ms alone, "
        f"{1e3 * shared.busy:.1f} ms and {1e3 * shared.waited:.2f} ms waited for "
        f"{shared.bytes / MIB:.0f} MiB in {shared.count} exchanges"
    )
    slow = f"expected {size.least:.0%}" if found < size.least else None
    yield Line(chip.name, size.name, "sampling", used, slow)


def step(
    there: Machine, stage: int, sizes: Mapping[str, int], unrolled: bool = False
) -> Cost:
    """What a step of a stage takes on a mesh of the machine's devices."""
    mesh = sharding.device_mesh(**sizes, devices=list(there.devices))
    model = _model(there)
    which = denoise._Program(model, mesh, stage, None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = denoise._euler_step.jitted.trace(which, *_arguments(which, unrolled))
    lowered = traced.lower(lowering_platforms=(there.platform,))
    text = lowered.compile(compiler_options=dict(programs.OPTIONS["gpu"])).as_text()
    return taken(Program.read(text), there, mesh, _seen(model, stage))


def taken(program: Program, there: Machine, mesh: Mesh, seen: float) -> Cost:
    """Predicted seconds of a program, whose operations come in their order.

    Exchanges come one after the other, beside what is between their start and their
    end.

    Args:
        seen: tokens that a token sees, on mean.
    """
    busy = waited = count = total = 0.0
    devices = list(mesh.devices.flat)
    working = {name: {} for name in program.times}
    for name, one, _ in program.running():
        working[name][one.name] = cost(program, name, one, there, seen)[2]
    for name, often in program.times.items():
        now = links = 0.0
        ends: dict[str, float] = {}
        for one in program.computations[name].values():
            sent = collective(program, name, one)
            if sent is not None:
                links = max(now, links) + sending(sent, devices, there)
                count, total = count + often, total + often * sent.bytes
                ends[one.name] = links
                now = now if sent.hidden else links
            elif one.kind.endswith("-done"):
                now = max([now, *(ends.get(each, 0.0) for each in one.operands)])
            else:
                now += working[name].get(one.name, 0.0)
        work = sum(working[name].values())
        busy, waited = busy + often * work, waited + often * (now - work)
    return Cost(busy, waited, total, int(count))


def _model(there: Machine) -> ModelConfig:
    dit, kind = VARIANTS["mmdit"], there.devices[0].device_kind
    tiles = tiles_for(there.backend, dit.head_dim, "bfloat16", 8192, kind)
    plain = tuple(tuple(tile) for tile in tiles)
    how = {"attention": there.backend, "attention_tiles": plain}
    dit = dataclasses.replace(dit, dtype="bfloat16", **how)
    cut = Layout(position_table=dit.position_table)
    return ModelConfig(dit, cut, LatentConfig(channels=CHANNELS))


def _plan(model: ModelConfig) -> SamplerPlan:
    stages = tuple(range(len(model.stages)))
    return SamplerPlan(model.stages, model.layout, reuse=stages)


def _seen(model: ModelConfig, stage: int) -> float:
    """Tokens that a token of the last unit sees, on mean."""
    clips = layout.recent_clips(stage, SHAPE[0] - 1)
    frames = flops.of_clips(model, CELLS, clips)
    known = WORDS + _plan(model).room(SHAPE, stage)
    return known + flops.segment_pairs(0, frames) / sum(frames)


def _arguments(which: Any, unrolled: bool) -> tuple[Any, ...]:
    """Shapes of what a step is called with, and where they are."""
    model, mesh, stage, _ = which
    shape, cfg, (height, width) = jax.ShapeDtypeStruct, model.dit, CELLS
    number = shape((), jnp.float32)
    text = Text(
        shape((2, WORDS, cfg.text_width), jnp.float32),
        shape((2, WORDS), jnp.int32),
        shape((2, 1, cfg.pooled_width), jnp.float32),
    )
    noise = KeyedNoise(shape((1, 2), jnp.uint32), SHAPE[1:], len(model.stages))
    side = 2 ** (len(model.stages) - stage)
    x, past = jax.eval_shape(
        partial(denoise._start_stage.jitted, which),
        shape((1, 1, height // side, width // side, CHANNELS), jnp.float32),
        shape((1, *SHAPE), jnp.float32),
        noise,
        shape((), jnp.int32),
    )
    boxed = jax.eval_shape(lambda: initialise(model, jax.random.key(0)))
    half = partial(jax.tree.map, lambda x: shape(x.shape, jnp.bfloat16))
    params = _placed(half(sharding.unbox(boxed)), sharding.shardings(boxed, mesh))
    params = _unrolled(params) if unrolled else params
    vectors = jax.eval_shape(
        partial(denoise._modulations.jitted, model, stage), params, text.pooled, number
    )
    tokens = _plan(model).room(SHAPE, stage)
    memory = jax.eval_shape(lambda: empty_memory(model, _zeros(text), tokens))
    rows = partial(sharding.batch_shardings, mesh=mesh)
    places = memory._replace(
        blocks=jax.tree.map(
            lambda x: sharding.place(x.shape, AXES, mesh), memory.blocks
        ),
        mask=rows(memory.mask),
        taken=_whole(memory.taken, mesh),
    )
    memory = _placed(memory, places)
    text, past, x = (_placed(tree, rows(tree)) for tree in (text, past, x))
    number, vectors, sigmas = (
        _placed(tree, _whole(tree, mesh))
        for tree in (number, vectors, shape((2,), jnp.float32))
    )
    return (params, text, number, vectors), x, past, sigmas, memory


def _unrolled(params: Any) -> Any:
    """`model.unrolled`, of shapes that know their places."""

    def one(x: Any) -> Any:
        place = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)

    def each(stack: Any) -> tuple[Any, ...]:
        return (jax.tree.map(one, stack),) * jax.tree.leaves(stack)[0].shape[0]

    dit = params["dit"]
    trees = {name: each(dit[name]) for name in STACKED if name in dit}
    return params | {"dit": dit | trees}


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _whole(tree: Any, mesh: Any) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        places,
    )
