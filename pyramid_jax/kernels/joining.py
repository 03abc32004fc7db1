# SPDX-License-Identifier: Apache-2.0
"""Norm, rotation and joining of queries and keys in one pass (Pallas, Triton).

What the streams of a block project lies in memory as `b n 3 heads dim`, one array for
each stream. Attention reads queries, keys and values of all tokens. XLA makes them of
it in two readings and one writing, since the mean square of a head has to be known
before the first of its features is scaled. A program of this kernel keeps the features
of one head of some tokens in registers meanwhile: it reads once and writes once.

The backward pass is that of the plain form, which the caller gives. The bias is added
here, too: XLA would write it into every row, for the product to be added to.
Compiled for sm_80 and sm_90 (docs/kernels.md), run only by the interpreter.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pyramid_jax import programs
from pyramid_jax.kernels.flash import Ref, Refs
from pyramid_jax.kernels.trial import difference
from pyramid_jax.kernels.visits import fill
from pyramid_jax.shapes import Array
from pyramid_jax.sharding import place, shares

logger = logging.getLogger(__name__)

TOKENS, WARPS = 64, 4  # of a program
ON_GPU = ("pallas_triton", "pallas_mosaic_gpu")  # backends that it runs beside


class Projection(NamedTuple):
    """What a stream projects: products, the bias that they lack, weights of norms.

    The products may have heads that are filled, so that devices divide them evenly.
    """

    qkv: Float[Array, "b _ 3 heads dim"]
    bias: Float[Array, "3 _ dim"]
    q_weight: Float[Array, "dim"]
    k_weight: Float[Array, "dim"]


Joined = tuple[Float[Array, "b l heads dim"], ...]  # queries, keys, values
Turned = tuple[Float[Array, "b l r"], Float[Array, "b l r"]]  # cosines and sines
Form = Callable[..., Joined]  # of streams, turns, eps


def joined(
    plain: Form,
    eps: float,
    streams: Sequence[Projection],
    turns: Turned,
    backend: str,
) -> Joined:
    """`plain(streams, turns, eps)`, by the kernel where attention has one on a GPU.

    The kernel follows the mesh that is set, and has to pass a trial on its device.
    """
    streams = [x for x in streams if x.qkv.shape[1]]
    shape, dtype = streams[0].qkv.shape, streams[0].qkv.dtype.name
    streams = [
        x._replace(bias=fill(jnp.asarray(x.bias), {1: shape[3]})) for x in streams
    ]
    on_gpu = backend in ON_GPU and shape[4] & (shape[4] - 1) == 0
    if not on_gpu or not _works(plain, eps, shape[4], dtype):
        return plain(streams, turns, eps)
    form = functools.partial(_on_gpu, plain, eps)
    if shares("batch") * shares("attended") == 1:
        return form(streams, turns)
    axes = "batch", None, None, "attended", None
    mesh = jax.sharding.get_abstract_mesh()
    rows, _, _, heads, _ = place(shape, axes, mesh).spec
    of_stream = Projection(P(rows, None, None, heads), P(None, heads), P(), P())
    return jax.shard_map(
        form,
        in_specs=([of_stream] * len(streams), P(rows)),
        out_specs=P(rows, None, heads),
        check_vma=False,
    )(streams, tuple(turns))


@functools.cache
def _works(plain: Form, eps: float, dim: int, dtype: str) -> bool:
    """Whether the kernel computes the plain form on this device; logs why not."""
    if jax.default_backend() != "gpu":
        return True
    shapes, kernel = trial_shapes(dim, dtype), functools.partial(_on_gpu, plain, eps)
    why = difference(kernel, functools.partial(plain, eps=eps), shapes)
    if why is not None:
        programs.keep(None)  # the next process may pass, and none should remember
        logger.warning(
            "queries and keys are joined without a kernel, which failed its trial on "
            "this device (%s)",
            why,
        )
    return why is None


def trial_shapes(dim: int, dtype: str) -> dict[str, Any]:
    """Arguments of the kernel and of its plain form: two streams, some blocks long."""
    lengths, heads, of = (TOKENS + 9, 3 * TOKENS - 5), 2, jax.ShapeDtypeStruct
    bias, weight = of((3, heads, dim), "float32"), of((dim,), "float32")
    turn = of((2, sum(lengths), dim // 2), "float32")
    streams = [
        Projection(of((2, n, 3, heads, dim), dtype), bias, weight, weight)
        for n in lengths
    ]
    return {"streams": streams, "turns": (turn, turn)}


def _on_gpu(
    plain: Form, eps: float, streams: Sequence[Projection], turns: Turned
) -> Joined:
    """The kernel; interpreted where it is compiled for a CPU, which is decided then."""
    slow, fast = (
        functools.partial(joined_triton, plain, eps, here) for here in (True, False)
    )
    return jax.lax.platform_dependent(streams, turns, cpu=slow, default=fast)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def joined_triton(
    plain: Form,
    eps: float,
    interpret: bool,
    streams: Sequence[Projection],
    turns: Turned,
) -> Joined:
    """What `plain` computes, in one pass on a GPU; `interpret` runs it anywhere."""
    rows, _, _, heads, dim = streams[0].qkv.shape
    lengths = [stream.qkv.shape[1] for stream in streams]
    out = jax.ShapeDtypeStruct((rows, sum(lengths), heads, dim), streams[0].qkv.dtype)

    def of_head(x: Any, *which: int) -> pl.BlockSpec:
        """All tokens of a head, of its queries, keys or values where they are joint."""
        block = (None, x.shape[1], *[None] * len(which), None, dim)
        return pl.BlockSpec(block, lambda head, i, b: (b, 0, *which, head, 0))

    def of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda head, i, b: (b, 0, 0))

    def bias(which: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, dim), lambda head, i, b: (which, head, 0))

    weight = pl.BlockSpec((dim,), lambda head, i, b: (0,))
    places = [
        Places(
            [of_head(x.qkv, i) for i in range(3)], [*map(bias, range(3))], [weight] * 2
        )
        for x in streams
    ]
    inputs = [Places([x.qkv] * 3, [x.bias] * 3, [*x[2:]]) for x in streams]
    return tuple(
        pl.pallas_call(
            functools.partial(joining_kernel, eps),
            out_shape=[out] * 3,
            grid=(heads, sum(pl.cdiv(n, TOKENS) for n in lengths), rows),
            in_specs=[places, [*map(of_row, turns)]],
            out_specs=[of_head(out)] * 3,
            compiler_params=plgpu.CompilerParams(num_warps=WARPS),
            interpret=interpret,
            name=joining_kernel.__name__,
        )(inputs, [*turns])
    )


class Places(NamedTuple):
    """A projection as a program sees it: queries, keys, values of a head apart."""

    tokens: Any
    biases: Any
    weights: Any


def joining_kernel(
    eps: float, streams: Sequence[Places], turns: Refs, *results: Ref
) -> None:
    block, first = pl.program_id(1), 0
    for stream in streams:
        length = stream.tokens[0].shape[0]
        count = pl.cdiv(length, TOKENS)

        @pl.when((block >= 0) & (block < count))
        def _(stream=stream, block=block, first=first) -> None:
            _join(eps, stream, block * TOKENS, first, turns, results)

        block, first = block - count, first + length


def _join(
    eps: float,
    stream: Places,
    at: Array,
    first: int,
    turns: Refs,
    results: Refs,
) -> None:
    length, dim = stream.tokens[0].shape
    here, there = pl.ds(at, TOKENS), pl.ds(first + at, TOKENS)

    def valid(width: int) -> Array:
        place = at + jax.lax.broadcasted_iota(jnp.int32, (TOKENS, width), 0)
        return place < length

    def read(x: Ref) -> Array:
        return plgpu.load(x, mask=valid(x.shape[1]), other=0.0).astype(jnp.float32)

    cos, sin = (read(x.at[there, :]) for x in turns)
    for i, result in enumerate(results):
        values = read(stream.tokens[i].at[here, :])
        values += stream.biases[i][...].astype(jnp.float32)[None]
        if i < len(stream.weights):
            mean = (values * values).sum(axis=1, keepdims=True) / dim
            weight = stream.weights[i][...].astype(jnp.float32)[None]
            values *= jax.lax.rsqrt(mean + eps) * weight
            values = _turned(values, cos, sin)
        values = values.astype(result.dtype)
        plgpu.store(result.at[there, :], values, mask=valid(dim))


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """`models.rotary.rotate`, in registers."""
    pairs = x.reshape(*cos.shape, 2)
    x, y = (part[..., 0] for part in jax.lax.split(pairs, (1, 1), axis=2))
    turned = (cos * x - sin * y)[..., None], (sin * x + cos * y)[..., None]
    return jnp.concatenate(turned, axis=2).reshape(x.shape[0], 2 * x.shape[1])


def _forward(plain: Form, eps: float, interpret: bool, streams: Any, turns: Any) -> Any:
    return joined_triton(plain, eps, interpret, streams, turns), (streams, turns)


def _backward(plain: Form, eps: float, interpret: bool, saved: Any, back: Any) -> Any:
    return jax.vjp(functools.partial(plain, eps=eps), *saved)[1](back)


joined_triton.defvjp(_forward, _backward)
