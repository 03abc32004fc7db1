# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the models: norms, modulation, embeddings, stacks of blocks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pyramid_jax.models.linear import dense
from pyramid_jax.shapes import Array
from pyramid_jax.sharding import HOST as HOST_MEMORY
from pyramid_jax.sharding import Axes, constrain, named

Streams = tuple[jax.Array, ...]  # what flows from block to block, e.g. (text, video)
Vectors = Float[jax.Array, "b s _"]  # of a modulation, side by side
# What the backward pass finds stored of a block, besides its streams; it computes the
# rest again. `HOST` moves the streams, too, out of the devices' memory.
NOTHING, ATTENTION, PRODUCTS = "nothing", "attention", "products"
EVERYTHING, HOST = "everything", "host"
REMAT = (NOTHING, ATTENTION, PRODUCTS, EVERYTHING, HOST)
# The primitives whose results these are; "name" marks those of attention in blocks.
# perf: writing the others to memory and reading them back takes longer than computing
# them in passes that run anyway (benchmarks/cpu_vs_reference.py).
_KERNELS = ("pallas_call", "name")
_STORED = {
    ATTENTION: _KERNELS,
    PRODUCTS: ("dot_general", "conv_general_dilated", *_KERNELS),
}
_STREAM = "stream"  # the name of a block's streams where they go to the host


def layer_norm(
    x: Float[jax.Array, "*shape"], eps: float = 1e-6, axes: Sequence[int] = (-1,)
) -> Float[jax.Array, "*shape"]:
    """Zero mean and unit variance over `axes`, in float32, without weights."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=axes, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt((centred**2).mean(axis=axes, keepdims=True) + eps)


def rms_norm(
    x: Float[jax.Array, "*b dim"], weight: Float[Array, "dim"], eps: float
) -> Float[jax.Array, "*b dim"]:
    """Unit root mean square over the last axis, in float32, times a weight."""
    y = x.astype(jnp.float32)
    # perf: a GPU sums alone, and scales where the result is rotated and joined;
    # otherwise it writes the scaled values and reads them again.
    scale = jax.lax.rsqrt((y**2).mean(axis=-1, keepdims=True) + eps)
    y = y * jax.lax.optimization_barrier(scale)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight that is trained."""

    eps: float

    def __call__(self, x: Float[jax.Array, "*b dim"]) -> Float[jax.Array, "*b dim"]:
        return rms_norm(x, self.weight(x.shape[-1]), self.eps)

    @nn.compact
    def weight(self, dim: int) -> Float[Array, "{dim}"]:
        """The weight of the features."""
        init = named(nn.initializers.ones, (None,))
        return self.param("weight", init, (dim,), jnp.float32)


class Affine(NamedTuple):
    """What conditioning does to tokens, in float32: before a layer and after it.

    One vector per token, or a single one where the row has one segment. It may meet
    fewer tokens than it was made for, which then are the last ones.
    """

    shift: Float[jax.Array, "b _ d"]
    scale: Float[jax.Array, "b _ d"]
    gate: Float[jax.Array, "b _ d"]

    def __call__(self, x: Float[jax.Array, "b n d"]) -> Float[jax.Array, "b n d"]:
        """The layer's input: x, shifted and scaled."""
        shift, scale = (part[:, -x.shape[1] :] for part in self[:2])
        return x * (1 + scale) + shift

    def add(
        self, x: Float[jax.Array, "b n d"], update: Float[jax.Array, "b n d"]
    ) -> Float[jax.Array, "b n d"]:
        """The layer's output, weighed by the gate and added to the stream x."""
        gate = self.gate[:, -x.shape[1] :]
        total = x.astype(jnp.float32) + gate * update.astype(jnp.float32)
        return total.astype(x.dtype)


class Modulation(nn.Module):
    """Maps the conditioning of every segment to `outputs` vectors of the width."""

    outputs: int
    width: int
    dtype: str

    def setup(self):
        axes, zeros = ("embed", "mlp"), nn.initializers.zeros
        self.linear = dense(self.outputs * self.width, axes, self.dtype, init=zeros)

    def __call__(self, cond: Float[jax.Array, "b s d"]) -> Vectors:
        vectors = self.linear(nn.silu(cond))
        # perf: whole vectors are small; parts of them would divide the tokens' width.
        return constrain(vectors, ("batch", None, None))

    def of_tokens(
        self, vectors: Vectors, segment: Int[jax.Array, "b n"]
    ) -> list[Float[jax.Array, "b _ d"]]:
        """The vectors of each token's segment, in float32."""
        parts = jnp.split(vectors.astype(jnp.float32), self.outputs, axis=-1)
        return [segment_vectors(part, segment) for part in parts]


def segment_vectors(
    x: Float[jax.Array, "b s d"], segment: Int[jax.Array, "b n"]
) -> Float[jax.Array, "b _ d"]:
    """The vector of each token's segment; a single one if a row has one segment."""
    count = x.shape[1]
    if count == 1:
        return x
    if count <= 4:
        return _selected(x, segment)
    one_hot = jax.nn.one_hot(segment, count, dtype=x.dtype)
    return jnp.einsum("bns,bsd->bnd", one_hot, x, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _selected(
    x: Float[jax.Array, "b s d"], segment: Int[jax.Array, "b n"]
) -> Float[jax.Array, "b n d"]:
    """perf: a chain of selections fuses into the elementwise work that uses it; but its
    gradient would be a sum over all tokens for each segment, instead of a product."""
    out = jnp.broadcast_to(x[:, :1], (*segment.shape, x.shape[-1]))
    for s in range(1, x.shape[1]):
        out = jnp.where((segment == s)[..., None], x[:, s : s + 1], out)
    return out


def _selected_forward(x: jax.Array, segment: jax.Array) -> tuple[jax.Array, Any]:
    return _selected(x, segment), (segment, x.shape[1])


def _selected_backward(saved: Any, back: jax.Array) -> tuple[jax.Array, None]:
    segment, count = saved
    one_hot = jax.nn.one_hot(jnp.maximum(segment, 0), count, dtype=back.dtype)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bns,bnd->bsd", one_hot, back, precision=highest), None


_selected.defvjp(_selected_forward, _selected_backward)


def sinusoid(
    time: Float[jax.Array, "b s"], width: int = 256
) -> Float[jax.Array, "b s _"]:
    """Cosines, then sines, of `time` (0..1000) at frequencies from 1 to 1e-4."""
    half = width // 2
    # parity: exponents rounded to float32; at time 1000 the angle shows their last bit.
    exponent = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
    exponent = (exponent / np.float32(half)).astype(np.float64)
    frequency = np.exp(exponent).astype(np.float32)
    angle = time.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Embedder(nn.Module):
    """Two linear maps with a SiLU between, for the time and for the pooled text."""

    width: int
    dtype: str

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.hidden = dense(self.width, (None, "embed"), self.dtype, init=init)
        self.out = dense(self.width, ("embed", None), self.dtype, init=init)

    def __call__(self, x: Float[jax.Array, "b s _"]) -> Float[jax.Array, "b s d"]:
        return self.out(nn.silu(self.hidden(x)))


def position_table(cells: int, base: int, width: int) -> np.ndarray:
    """Sines, then cosines, of a coordinate at `width / 4` frequencies, a row per cell.

    A grid of `base` cells spans the range of the image model that the weights come
    from; positions are therefore scaled by base / cells.
    """
    # parity: rounded to float32 before the products, which are float64.
    position = (np.arange(cells, dtype=np.float32) / np.float32(cells / base)).astype(
        np.float64
    )
    frequency = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    angle = np.outer(position, frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def interpolate_table(
    table: Float[np.ndarray, "cells half"], position: Float[jax.Array, "b n"]
) -> Float[jax.Array, "b n half"]:
    """The table's rows at fractional positions, linearly interpolated."""
    low = jnp.floor(position)
    fraction = (position - low)[..., None]
    index = low.astype(jnp.int32)
    last = len(table) - 1
    rows = jnp.asarray(table)
    below, above = rows[index.clip(0, last)], rows[(index + 1).clip(0, last)]
    return below * (1 - fraction) + above * fraction


def convolution(
    width: int, kernel: tuple[int, ...], dtype: str, *, init: Any, **others: Any
) -> nn.Conv:
    """A convolution that pads with one cell; `init` names the axes of its weights.

    Args:
        others: of `nn.Conv`, such as its strides.
    """
    return nn.Conv(
        width,
        kernel,
        padding=1,
        dtype=jnp.dtype(dtype),
        kernel_init=init,
        bias_init=named(nn.initializers.zeros, (None,)),
        **others,
    )


def stacked(
    key: jax.Array, block: nn.Module, count: int, *inputs: Any, method: Any = None
) -> Any:
    """Fresh weights of `count` equal blocks, along a leading axis called "layers".

    Args:
        inputs: what a block, or that method of it, is called with, of any size.
    """

    def one(key: jax.Array) -> Any:
        return block.init(key, *inputs, method=method)["params"]

    weights = jax.vmap(one)(jax.random.split(key, count))
    return nn.meta.add_axis(weights, 0, {nn.PARTITION_NAME: "layers"})


def unstacked(weights: Any) -> tuple[Any, ...]:
    """The weights of every block by themselves, for `scan` to unroll."""
    leaves, tree = jax.tree.flatten(weights)
    return tuple(tree.unflatten(of_block) for of_block in zip(*leaves, strict=True))


def each(make: Callable[[Any], Any], weights: Any) -> Any:
    """What `make` makes of the weights of every block, along first axes."""
    if isinstance(weights, tuple):
        return jax.tree.map(lambda *x: jnp.stack(x), *map(make, weights))
    return jax.lax.map(make, weights)


def scan(
    block: Callable[..., Any],
    weights: Any,
    state: Streams,
    inputs: Any = None,
    *,
    axes: Axes | None = None,
    remat: str = PRODUCTS,
    noting: bool = False,
) -> Any:
    """The state after all blocks, each called as block(weights, inputs, *state).

    perf: compiling takes the time of one block, whatever the depth. Where the weights
    are a tuple, one tree for each block, the loop is unrolled: programs are larger and
    copy no slices of stacked weights.

    Args:
        weights: as `stacked` or `unstacked` makes them.
        inputs: what else every block has for itself, along first axes, or None.
        axes: of every array of the state, whose layout is pinned before each block.
        remat: one of `REMAT`, what is stored of a block for the backward pass.
        noting: a block returns a pair, the state and a note; so does the scan, with the
            notes of all blocks along first axes.
    """

    def step(state: Streams, layer: tuple[Any, Any]) -> tuple[Streams, Any]:
        if axes is not None:
            state = tuple(constrain(x, axes) for x in state)
        if remat == HOST:
            state = tuple(checkpoint_name(x, _STREAM) for x in state)
        out = block(*layer, *state)
        out, note = out if noting else (out, None)
        return (out if isinstance(out, tuple) else (out,)), note

    step = _rematerialised(step, remat)
    if isinstance(weights, tuple):
        some = jax.tree.leaves(inputs)
        each = unstacked(inputs) if some else [inputs] * len(weights)
        notes = []
        for layer in zip(weights, each, strict=True):
            state, note = step(state, layer)
            notes.append(note)
        made = state, jax.tree.map(lambda *x: jnp.stack(x), *notes)
    else:
        made = jax.lax.scan(step, state, (weights, inputs))
    return made if noting else made[0]


def _rematerialised(step: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """A block of which the backward pass finds stored what one of `REMAT` says."""
    if remat == EVERYTHING:
        return step
    if remat == NOTHING:
        return jax.checkpoint(step)
    if remat == HOST:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_STREAM],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
        return jax.checkpoint(step, policy=policy)
    stored = _STORED[remat]

    def keeps(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in stored

    return jax.checkpoint(step, policy=keeps, prevent_cse=False)
