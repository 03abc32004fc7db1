# SPDX-License-Identifier: Apache-2.0
"""The released VAE's decoder, through a chip's compiler: memory, and what it moves.

On a GPU, convolutions run in cuDNN, and all the rest in kernels that wait for memory:
bytes are counted in the compiled program. Several devices divide the rows of a frame.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.compile.chips import GPU, TPU
from launch.compile.kernels import Line
from launch.compile.program import Program, collectives
from pyramid_jax import programs, sharding
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.vae.codec import vae_step

CFG = VAEConfig(dtype="bfloat16")
GIB = 2**30
# Kinds of traffic, by what the compiler calls a kernel.
CONVOLUTIONS, REST = "convolutions and products", "rest"
KINDS = {
    "wrapped_concatenate": "frames copied to their past",
    "concatenate": "norm, SiLU, joining to the past",
    "reduce": "means and variances of norms",
    "transpose": "other orders of axes, new pixels",
    "copy": "copies",
    "slice": "the next past",
}
APART = 0.1  # of what is joined to its past; more must not be copied for it
ONE: Mapping[str, int] = MappingProxyType({})


class DecoderStep(NamedTuple):
    """A later step of a stream: size of a frame in pixels, latent frames to decode.

    `mesh` are the sizes of the axes of several devices of one host.
    """

    name: str
    height: int
    width: int
    frames: int
    mesh: Mapping[str, int] = ONE


class Compiled(NamedTuple):
    """A step's program, what it reserves, and bytes by name of its arguments."""

    program: Program
    memory: Any
    arguments: Mapping[str, int]


class Traffic(NamedTuple):
    """Bytes of memory that kernels of a kind read and write, and how many there are."""

    bytes: float
    kernels: int


SIZES = (
    DecoderStep("384p decode 1", 384, 640, 1),
    DecoderStep("384p decode 2", 384, 640, 2),
    DecoderStep("384p decode 1 on 4", 384, 640, 1, {"tensor": 4}),
    DecoderStep("768p decode 1", 768, 1280, 1),
    DecoderStep("768p decode 2", 768, 1280, 2),
)


def compiled(chip: GPU | TPU, size: DecoderStep) -> Iterator[Line]:
    """Compiles a step; a line with its memory and, for a GPU, with what it moves."""
    if size.mesh and not isinstance(chip, GPU):
        return
    try:
        step = program(chip, size)
    except Exception as error:  # each compiler has its own kinds
        yield Line(chip.name, size.name, refusal=str(error).split("\n")[0][:300])
        return
    memory = step.memory
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {**step.arguments, "pixels": output, "rest": memory.temp_size_in_bytes}
    used = ", ".join(f"{name} {n / GIB:.2f} GiB" for name, n in sizes.items())
    if not isinstance(chip, GPU):
        yield Line(chip.name, size.name, "decoder", used)
        return
    found = traffic(step.program)
    moved = ", ".join(f"{k} {x.bytes / 1e9:.1f} GB" for k, x in found.items())
    used = f"{used}; {step.program.flops() / 1e12:.1f} TFLOP; {moved}"
    yield Line(chip.name, size.name, "decoder", used, waste(found))


def program(
    chip: GPU | TPU, size: DecoderStep, options: Mapping[str, Any] = ONE
) -> Compiled:
    """The step, compiled; options are the compiler's, besides those of the package."""
    devices = [chip.device()]
    if isinstance(chip, GPU):
        options = {**programs.OPTIONS["gpu"], **options}
        devices = list(chip.devices(math.prod(size.mesh.values())))
    mesh = sharding.device_mesh(**{"data": 1, **size.mesh}, devices=devices)
    params, latents, past = arguments(size, mesh)
    shared = mesh if size.mesh else None

    def decoded(params: Any, latents: jax.Array, past: Any) -> Any:
        return vae_step(vae.decode, CFG, params, shared)(latents, past)

    step = jax.jit(decoded, donate_argnums=2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = step.trace(params, latents, past)
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    made = lowered.compile(compiler_options=dict(options))
    known = {"weights": _bytes(params), "past": _bytes(past)}
    return Compiled(Program.read(made.as_text() or ""), made.memory_analysis(), known)


def traffic(program: Program) -> dict[str, Traffic]:
    """What a device reads and writes in a step, by kinds, most first; and exchanges."""
    found: dict[str, Traffic] = defaultdict(lambda: Traffic(0.0, 0))

    def add(kind: str, bytes: float, often: int) -> None:
        known = found[kind]
        found[kind] = Traffic(known.bytes + often * bytes, known.kernels + often)

    for inside, one, often in program.running():
        kind = next((kind for part, kind in KINDS.items() if part in one.name), REST)
        kind = CONVOLUTIONS if program.work(inside, one) else kind
        add(kind, program.moved(inside, one), often)
    for one, often in collectives(program):
        add("exchanged", one.bytes, often)
    return dict(sorted(found.items(), key=lambda each: -each[1].bytes))


def waste(found: Mapping[str, Traffic]) -> str | None:
    """What the step moves without need, if anything."""
    nothing = Traffic(0.0, 0)
    copied, computed = (
        found.get(KINDS[kind], nothing).bytes
        for kind in ("wrapped_concatenate", "concatenate")
    )
    if copied <= APART * (copied + computed):
        return None
    return f"{copied / 1e9:.1f} GB of frames are copied to be joined to their past"


def arguments(size: DecoderStep, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Shapes of weights, latents and past on the devices of a mesh."""
    fresh = jax.eval_shape(partial(vae.initialise_vae, CFG), jax.random.key(0))
    side = CFG.spatial_factor
    cells = (size.height // side, size.width // side, CFG.latent)
    latents = jax.ShapeDtypeStruct((1, size.frames, *cells), jnp.float32)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, CFG.dtype), sharding.unbox(fresh)
    )
    _, past = jax.eval_shape(partial(vae.decode, CFG), params, latents)
    axes = ("batch", "frames", "height")
    _, frames, height = sharding.place(latents.shape[:3], axes, mesh).spec

    def placed(tree: Any, where: P) -> Any:
        there = NamedSharding(mesh, where)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree
        )

    of_past, of_latents = P(None, None, height), P(None, frames, height)
    return placed(params, P()), placed(latents, of_latents), placed(past, of_past)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
