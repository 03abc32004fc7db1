# SPDX-License-Identifier: Apache-2.0
"""A training step on a machine that is not here: does it fit, and how fast may it be?

The step is the one that a run compiles. Memory, products and exchanges are read from
the program that the machine's own compiler makes; seconds are a prediction, whose
assumptions are printed beside it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
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
from launch.compile.workload import Workload, workload
from pyramid_jax.config import build
from pyramid_jax.training.state import TrainState, abstract_state
from pyramid_jax.training.step import StepConfig
from pyramid_jax.training.task import task_step

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
    work: Workload


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
    """The training step of a config, compiled for a machine.

    Args:
        elsewhere: makes its text and bytes in another process; None: this one does.

    Raises:
        ValueError: as `workload`.
    """
    work = workload(cfg, machine)
    like = abstract_state(work.task.init, work.task.optimizer, work.mesh)
    how = build(StepConfig, cfg.step.to_dict())
    step, state = task_step(work.task, how, like, work.frozen)
    make = elsewhere or partial(_made, step, state, work.batch, machine.platform)
    return Compiled(*make(), work)


def _made(
    step: Any, like: TrainState, batch: Any, platform: str
) -> tuple[str, Mapping[str, int]]:
    """The text of a step and its bytes on a device, from the compiler."""
    mesh = like.step.sharding.mesh
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.trace(like, batch, key).lower(lowering_platforms=(platform,))
    made = lowered.compile()
    return made.as_text(), bytes_of(made.memory_analysis())


def plan(name: str, made: Compiled, machine: Machine) -> Plan:
    """The numbers of a compiled step.

    Raises:
        ValueError: they contradict each other.
    """
    program, chip = Program.read(made.text), machine.chip
    work = made.work
    done: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for inside, one, often in program.running():
        kind, count, time = cost(program, inside, one, machine, work.seen)
        done[kind] += often * count
        seconds[kind] += often * time
    exchanges = exchanged(program, work.mesh, machine)
    shown = sum(x["seconds"] for x in exchanges if not x["hidden"])
    hidden = sum(x["seconds"] for x in exchanges if x["hidden"])
    busy = sum(seconds.values())
    seconds["exchanges"] = shown + max(0.0, hidden - busy)
    seconds["step"] = busy + seconds["exchanges"]
    devices = work.mesh.size
    return Plan(
        config=name,
        machine=machine.name,
        devices=devices,
        mesh=dict(work.mesh.shape),
        hops=_hops(work.mesh),
        rows=work.rows,
        memory=made.memory,
        capacity=chip.memory,
        flops={
            "peak": chip.peak,
            "products": program.flops(),
            "attention": done["attention"],
            "needed": work.needed() / devices,
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
