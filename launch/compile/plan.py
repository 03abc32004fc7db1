# SPDX-License-Identifier: Apache-2.0
"""A training step on a machine that is not here: does it fit, and how fast may it be?

The step is the one that a run compiles. Memory, products and exchanges are read from
the program that the machine's own compiler makes; seconds are a prediction, whose
assumptions are printed beside it.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.compile.dump import bytes_of
from launch.compile.machines import GIB, USABLE, Machine, hops, spanned
from launch.compile.program import (
    Collective,
    Operation,
    Program,
    collectives,
    dimensions,
)
from pyramid_jax import flops, sharding
from pyramid_jax import model as models
from pyramid_jax.config import build
from pyramid_jax.data.examples import DataConfig, segment_clips
from pyramid_jax.kernels.tiles import TILED, tiles_for
from pyramid_jax.model import ModelConfig
from pyramid_jax.shapes import Rows
from pyramid_jax.train import data_config
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import TrainState, abstract_state, with_moments
from pyramid_jax.training.step import StepConfig, train_step

MakeText = Callable[[], tuple[str, Mapping[str, int]]]
# Matrix products of attention that a kernel makes of every visible pair of tokens.
KERNELS = {"forward_kernel": 2, "query_kernel": 3, "key_kernel": 4}
# Shares of the peak, or of the bandwidth, where the compiler has no estimate.
PRODUCTS, ATTENTION, MEMORY, LINKS = 0.7, 0.5, 0.8, 0.8
ASSUMPTIONS = (
    "rows are full of tokens, as in packing without padding",
    "TPUs: what the compiler estimates in cycles takes them",
    f"everything else: products run at {PRODUCTS:.0%} of the peak, or at "
    f"{MEMORY:.0%} of the bandwidth, whichever takes longer",
    f"attention runs at {ATTENTION:.0%} of the peak that heads of this width allow "
    "(they fill half of a matrix unit of 128, a quarter of 256)",
    f"exchanges use {LINKS:.0%} of the links along the axes of the torus that a group "
    "spans; those that the program hides cost nothing while they are shorter than "
    "everything else",
)


class Compiled(NamedTuple):
    """A step, compiled: its text, its bytes on a device, and what it was made for."""

    text: str
    memory: Mapping[str, int]
    mesh: Mesh
    like: TrainState
    model: ModelConfig
    data: DataConfig


@dataclass(frozen=True)
class Plan:
    """What a step takes on one device of a machine, and how long it may take."""

    config: str
    machine: str
    devices: int
    mesh: Mapping[str, int]
    hops: Mapping[str, float]
    rows: int
    memory: Mapping[str, float]  # bytes
    capacity: float
    flops: Mapping[str, float]
    exchanges: list[dict[str, Any]]
    seconds: Mapping[str, float]
    compiler: str

    def __post_init__(self):
        for name, share in (("busy", self.busy), ("utilisation", self.utilisation)):
            if share > 1:
                raise ValueError(
                    f"the prediction of {self.config} on {self.machine} is wrong: it "
                    f"is {name} to {share:.0%}"
                )

    @property
    def fits(self) -> bool:
        """Whether what it takes on a device leaves the runtime its share."""
        return self.memory["total"] <= USABLE * self.capacity

    @property
    def utilisation(self) -> float:
        """The share of the devices' peak that goes into what the model needs."""
        return self.flops["needed"] / self.flops["peak"] / self.seconds["step"]

    @property
    def busy(self) -> float:
        """The same of all products that the program makes, recomputed ones too."""
        done = self.flops["products"] + self.flops["attention"]
        return done / self.flops["peak"] / self.seconds["step"]

    def record(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        verdicts = ("fits", "utilisation", "busy")
        return asdict(self) | {name: getattr(self, name) for name in verdicts}


def compiled(cfg: Any, machine: Machine, elsewhere: MakeText | None = None) -> Compiled:
    """The step of a config of the DiT, compiled for a machine.

    Args:
        elsewhere: makes its text and bytes in another process; None: this one does.

    Raises:
        ValueError: the config trains something else, or the rows of its batch can't be
            divided over the mesh.
    """
    if "model" not in cfg or "teacher" in cfg:
        raise ValueError(
            "steps of VAEs and students can't be compiled for other machines yet; give "
            "the config of a DiT"
        )
    mesh = sharding.device_mesh(**cfg.mesh.to_dict(), devices=list(machine.devices))
    model = models.model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    model = dataclasses.replace(model, dit=_attending(model, data, machine))
    parts = sharding.parts("batch", mesh)
    if data.batch % (parts * cfg.step.accumulate):
        raise ValueError(
            f"a batch of {data.batch} rows can't be divided over {parts} devices in "
            f"{cfg.step.accumulate} microbatches; set --config.data.batch"
        )
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    init = partial(models.initialise, model)
    rule = optimizer(rates, jax.eval_shape(init, jax.random.key(0)))
    how = build(StepConfig, cfg.step.to_dict())
    like = with_moments(abstract_state(init, rule, mesh), how.moments)
    loss = partial(models.training_loss, model)
    step: Any = train_step(loss, rule, learning_rate(rates), how, like)
    make = elsewhere or partial(
        _made, step, like, batch_shapes(model, data, mesh), machine.platform
    )
    text, used = make()
    return Compiled(text, used, mesh, like, model, data)


def _made(
    step: Any, like: TrainState, rows: Rows, platform: str
) -> tuple[str, Mapping[str, int]]:
    """The text of a step and its bytes on a device, from the compiler."""
    mesh = like.step.sharding.mesh
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.trace(like, rows, key).lower(lowering_platforms=(platform,))
    made = lowered.compile()
    return made.as_text(), bytes_of(made.memory_analysis())


def batch_shapes(model: ModelConfig, data: DataConfig, mesh: Mesh) -> Rows:
    """Shapes and shardings of a batch of packed rows."""
    b, n, m, s = data.batch, data.tokens, data.text_tokens, data.segments
    p, own = model.dit.patch_values, model.text is not None
    real, whole = jnp.float32, jnp.int32
    shapes = Rows(
        clean=jax.ShapeDtypeStruct((b, n, p), real),
        coarser=jax.ShapeDtypeStruct((b, n, p), real),
        position=jax.ShapeDtypeStruct((b, n, 3), real),
        segment=jax.ShapeDtypeStruct((b, n), whole),
        frame=jax.ShapeDtypeStruct((b, n), whole),
        current=jax.ShapeDtypeStruct((b, n), jnp.bool_),
        stage=jax.ShapeDtypeStruct((b, s), whole),
        text=jax.ShapeDtypeStruct((b, m), whole)
        if own
        else jax.ShapeDtypeStruct((b, m, model.dit.text_width), real),
        text_segment=jax.ShapeDtypeStruct((b, m), whole),
        pooled=jax.ShapeDtypeStruct((b, s, 0 if own else model.dit.pooled_width), real),
    )
    places = sharding.batch_shardings(shapes, mesh)
    placed: Any = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        places,
    )
    return placed


def plan(name: str, made: Compiled, machine: Machine) -> Plan:
    """The numbers of a compiled step.

    Raises:
        ValueError: they contradict each other.
    """
    program, chip = Program.read(made.text), machine.chip
    pairs = row_pairs(made.model, made.data)
    length = made.data.tokens + made.data.text_tokens
    done: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for inside, one, often in program.running():
        kind, work, time = cost(program, inside, one, machine, pairs / length)
        done[kind] += often * work
        seconds[kind] += often * time
    exchanges = exchanged(program, made.mesh, machine)
    shown = sum(x["seconds"] for x in exchanges if not x["hidden"])
    hidden = sum(x["seconds"] for x in exchanges if x["hidden"])
    busy = sum(seconds.values())
    seconds["exchanges"] = shown + max(0.0, hidden - busy)
    seconds["step"] = busy + seconds["exchanges"]
    count = made.mesh.size
    return Plan(
        config=name,
        machine=machine.name,
        devices=count,
        mesh=dict(made.mesh.shape),
        hops=_hops(made.mesh),
        rows=made.data.batch,
        memory=made.memory,
        capacity=chip.memory,
        flops={
            "peak": chip.peak,
            "products": program.flops(),
            "attention": done["attention"],
            "needed": needed(made) / count,
        },
        exchanges=exchanges,
        seconds=dict(seconds),
        compiler=f"JAX {jax.__version__}",
    )


def report(plan: Plan) -> str:
    """What a person wants to know of a plan."""
    used = ", ".join(f"{k} {v / GIB:.2f}" for k, v in plan.memory.items())
    mesh = " x ".join(f"{k} {n}" for k, n in plan.mesh.items() if n > 1) or "one device"
    ways = ", ".join(f"{name} {way:.2f}" for name, way in plan.hops.items())
    lines = [
        f"{plan.config} on {plan.machine}: {plan.devices} devices, {mesh}, "
        f"{plan.rows} rows ({plan.compiler})",
        *([f"links between neighbours: {ways}"] if ways else []),
        f"memory of a device, GiB: {used}, of {plan.capacity / GIB:.1f}: "
        + ("it fits" if plan.fits else f"more than {USABLE:.0%}, IT DOES NOT FIT"),
        f"FLOP of a device: {plan.flops['products']:.3e} in products, "
        f"{plan.flops['attention']:.3e} in attention; the model needs "
        f"{plan.flops['needed']:.3e}",
        *(
            f"{x['kind']} of {x['dtype']} among {x['devices']}: {x['count']} times, "
            f"{x['bytes'] / GIB:.2f} GiB, {x['seconds']:.3f} s, "
            + ("beside other work" if x["hidden"] else "WAITED FOR")
            for x in plan.exchanges
        ),
        "predicted seconds: "
        + ", ".join(f"{name} {s:.3f}" for name, s in plan.seconds.items()),
        f"predicted utilisation {plan.utilisation:.1%}, {plan.busy:.1%} with what is "
        "computed again",
        "assumptions:",
        *(f"- {each}" for each in ASSUMPTIONS),
    ]
    return "\n".join(lines)


def needed(made: Compiled) -> float:
    """FLOP of a step on full rows: forward, and twice as much backward."""
    model, data = made.model, made.data
    cost = flops.row_cost(model, {"dit": made.like.params["dit"]})
    products = cost.products(data.text_tokens, data.tokens, data.segments)
    return 3 * data.batch * (products + cost.pair * row_pairs(model, data))


def row_pairs(model: ModelConfig, data: DataConfig) -> float:
    """Pairs of tokens that the mask lets through in a full row, on mean.

    The rows hold what packing draws: all units of all stages, equally many of the
    first size.
    """
    grid = data.latent.grid(data.height, data.width, data.layout.patch, 1)
    text = data.text_tokens // data.segments
    tokens = seen = 0
    every_unit = [None] if data.units is None else range(data.units)
    for stage in data.pattern:
        for unit in every_unit:
            clips = segment_clips(data.latent_frames, stage, unit, data.layout)
            frames = flops.of_clips(model, grid, clips)
            tokens += text + sum(frames)
            visible = flops.segment_pairs(text, frames)
            seen += visible if model.dit.causal else (text + sum(frames)) ** 2
    return seen / tokens * (data.tokens + data.text_tokens)


def _attending(model: ModelConfig, data: DataConfig, machine: Machine) -> Any:
    """The network with the attention of the machine, and tiles for it, if any."""
    backend, dit = machine.backend, model.dit
    if backend not in TILED:
        return dataclasses.replace(dit, attention=backend)
    kind, length = machine.devices[0].device_kind, data.tokens + data.text_tokens
    tiles = tiles_for(backend, dit.head_dim, dit.dtype, length, kind)
    plain = tuple(tuple(tile) for tile in tiles)
    return dataclasses.replace(dit, attention=backend, attention_tiles=plain)


def cost(
    program: Program, inside: str, one: Operation, machine: Machine, seen: float
) -> tuple[str, float, float]:
    """What kind of work an operation is, its FLOP, and the seconds that it takes.

    Args:
        seen: tokens that a token sees, on mean.
    """
    chip = machine.chip
    slow = program.moved(inside, one) / chip.bandwidth / MEMORY
    kernel = next((k for k in KERNELS if k in one.name or k in one.origin), None)
    if one.kind == "custom-call" and kernel:
        read = (program.computations[inside][name].result for name in one.operands)
        tokens = next(result for result in read if not result.startswith("s32"))
        work = 2 * KERNELS[kernel] * seen * math.prod(dimensions(tokens))
        rate = chip.peak * ATTENTION * min(1, 64 / chip.unit)
        return "attention", work, max(work / rate, slow)
    work = program.work(inside, one)
    kind = "products" if work else "rest"
    if machine.platform == "tpu" and one.cycles:
        return kind, work, one.cycles / chip.clock
    return kind, work, max(work / chip.peak / PRODUCTS, slow)


def exchanged(program: Program, mesh: Mesh, machine: Machine) -> list[dict[str, Any]]:
    """The exchanges of a step by kind, size of a group, and type of the numbers."""
    devices = list(mesh.devices.flat)
    found: dict[tuple[Any, ...], dict[str, float]] = defaultdict(
        lambda: defaultdict(float)
    )
    for one, often in collectives(program):
        seconds = sending(one, devices, machine)
        group = len(one.group) or len(devices)
        total = found[one.kind, group, one.hidden, "+".join(sorted(one.dtypes))]
        total["count"] += often
        total["bytes"] += often * one.bytes
        total["seconds"] += often * seconds
    names = ("kind", "devices", "hidden", "dtype")
    return [
        dict(zip(names, key, strict=True)) | dict(found[key]) for key in sorted(found)
    ]


def sending(one: Collective, devices: Sequence[Any], machine: Machine) -> float:
    """Seconds of one exchange among some of the devices."""
    group = [devices[i] for i in one.group] or list(devices)
    rate = machine.chip.link * spanned(group) * LINKS
    ways = 2 if one.kind == "all-reduce" else 1
    return one.bytes * ways * (len(group) - 1) / len(group) / rate


def _hops(mesh: Mesh) -> dict[str, float]:
    """Links between neighbours, along the axes that divide anything."""
    if not hasattr(mesh.devices.flat[0], "coords"):
        return {}
    ways = zip(mesh.axis_names, hops(mesh.devices), strict=True)
    return {name: way for name, way in ways if mesh.shape[name] > 1}
