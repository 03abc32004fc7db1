# SPDX-License-Identifier: Apache-2.0
"""The released VAE's decoder, through a chip's compiler: the memory of a step."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from launch.compile.chips import GPU, TPU
from launch.compile.kernels import Line
from pyramid_jax import sharding
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig

CFG = VAEConfig(dtype="bfloat16")
GIB = 2**30


class DecoderStep(NamedTuple):
    """A later step of a stream: size of a frame in pixels, latent frames to decode."""

    name: str
    height: int
    width: int
    frames: int


SIZES = (
    DecoderStep("384p decode 1", 384, 640, 1),
    DecoderStep("384p decode 2", 384, 640, 2),
    DecoderStep("768p decode 1", 768, 1280, 1),
    DecoderStep("768p decode 2", 768, 1280, 2),
)


def compiled(chip: GPU | TPU, size: DecoderStep) -> Iterator[Line]:
    """Compiles a step; a line with the memory of weights, past, and everything else."""
    params, latents, past = arguments(size, chip.device())
    step = jax.jit(partial(vae.decode, CFG), donate_argnums=2)
    try:
        memory: Any = step.lower(params, latents, past).compile().memory_analysis()
    except Exception as error:  # each compiler has its own kinds
        yield Line(chip.name, size.name, refusal=str(error).split("\n")[0][:300])
        return
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "weights": _bytes(params),
        "past": _bytes(past),
        "pixels": output,
        "rest": memory.temp_size_in_bytes,
    }
    used = ", ".join(f"{name} {n / GIB:.2f} GiB" for name, n in sizes.items())
    yield Line(chip.name, size.name, "decoder", used)


def arguments(size: DecoderStep, device: Any) -> tuple[Any, Any, Any]:
    """Shapes of weights, latents and past on a device."""
    one = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    here = NamedSharding(one, PartitionSpec())
    fresh = jax.eval_shape(partial(vae.initialise_vae, CFG), jax.random.key(0))
    side = CFG.spatial_factor
    cells = (size.height // side, size.width // side, CFG.latent)
    latents = jax.ShapeDtypeStruct((1, size.frames, *cells), jnp.float32)
    params = sharding.unbox(fresh)
    _, past = jax.eval_shape(partial(vae.decode, CFG), params, latents)
    placed: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (params, latents, past),
    )
    return placed


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
