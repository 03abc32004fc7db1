# SPDX-License-Identifier: Apache-2.0
"""Norm, rotation and joining of queries and keys in one pass (Pallas, Triton).

What the streams of a block project lies in memory as `b n 3 heads dim`, one array for
each stream. Attention reads queries, keys and values of all tokens. XLA makes them of
it in two readings and one writing, since the mean square of a head has to be known
before the first of its features is scaled. A program of this kernel keeps the features
of one head of some tokens in registers meanwhile: it reads once and writes once.

The backward pass is that of the plain form, which the caller gives. The bias is added
here, too: XLA would write it into every row, for the product to be added to. Where
devices share the tokens, a program writes its head where it is sent from.
Compiled for sm_80 and sm_90 (docs/kernels.md), run only by the interpreter.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
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


class Order(NamedTuple):
    """Which heads are written, and in which order: those of each of `parts` devices.

    Every device gets heads of all groups; those of one group are written.
    """

    parts: int = 1
    groups: int = 1
    group: int = 0

    def each(self, heads: int) -> int:
        """How many heads of the group a part has."""
        return heads // (self.parts * self.groups)

    def head(self, heads: int, at: Any) -> Any:
        """The head that is written at a place."""
        each = self.each(heads)
        return (at // each * self.groups + self.group) * each + at % each


Joined = tuple[Float[Array, "b l heads dim"], ...]  # queries, keys, values
Sent = Float[Array, "parts b n 3 _ dim"]
Group = tuple[Float[Array, "b l _ dim"], ...]  # the same of some heads
Turned = tuple[Float[Array, "b l r"], Float[Array, "b l r"]]  # cosines and sines
Form = Callable[..., Any]  # of streams, turns, eps


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
    shape = streams[0].qkv.shape
    streams = [
        x._replace(bias=fill(jnp.asarray(x.bias), {1: shape[3]})) for x in streams
    ]
    if not _by_kernel(plain, eps, streams[0].qkv, backend):
        return plain(streams, turns, eps)
    form = functools.partial(_on_gpu, plain, eps, None)
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


def sent_by_heads(
    plain: Form,
    eps: float,
    stream: Projection,
    turns: Turned,
    backend: str,
    groups: int,
) -> list[Group]:
    """The same of one stream whose tokens devices share, in groups of heads.

    Every device gets all tokens of some heads. What it sends is written where it is
    sent from, by the kernel, so that nothing is copied for the exchange.
    """
    mesh, shape = jax.sharding.get_abstract_mesh(), stream.qkv.shape
    axes = "batch", "tokens", None, "heads", None
    rows, tokens, _, heads, _ = place(shape, axes, mesh).spec
    parts, kernel = shares("tokens"), _by_kernel(plain, eps, stream.qkv, backend)

    def of_device(stream: Projection, turns: Turned) -> list[Array]:
        def exchanged(group: int) -> Array:
            order = Order(parts, groups, group)
            form = _on_gpu if kernel else _in_order
            sent = form(plain, eps, order, [stream], turns)
            found = jax.lax.all_to_all(sent, tokens, 0, 0, tiled=True)
            return rearrange(found, "s b n three k dim -> b (s n) three k dim")

        return [exchanged(group) for group in range(groups)]

    of_stream = Projection(P(rows, tokens, None, heads), P(None, heads), P(), P())
    attended = place(shape, ("batch", None, None, "attended", None), mesh).spec
    found = jax.shard_map(
        of_device,
        in_specs=(of_stream, P(rows, tokens)),
        out_specs=attended,
        check_vma=False,
    )(stream._replace(bias=jnp.asarray(stream.bias)), tuple(turns))
    return [tuple(jnp.moveaxis(x, 2, 0)) for x in found]


def _by_kernel(plain: Form, eps: float, qkv: Array, backend: str) -> bool:
    dim = qkv.shape[4]
    on_gpu = backend in ON_GPU and dim & (dim - 1) == 0
    return on_gpu and _works(plain, eps, dim, qkv.dtype.name)


@functools.cache
def _works(plain: Form, eps: float, dim: int, dtype: str) -> bool:
    """Whether the kernel computes the plain form on this device; logs why not."""
    if jax.default_backend() != "gpu":
        return True
    shapes = trial_shapes(dim, dtype)
    kernel = functools.partial(_on_gpu, plain, eps, None)
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
    plain: Form,
    eps: float,
    order: Order | None,
    streams: Sequence[Projection],
    turns: Turned,
) -> Any:
    """The kernel; interpreted where it is compiled for a CPU, which is decided then."""
    slow, fast = (
        functools.partial(joined_triton, plain, eps, order, here)
        for here in (True, False)
    )
    return jax.lax.platform_dependent(streams, turns, cpu=slow, default=fast)


def _in_order(
    plain: Form,
    eps: float,
    order: Order | None,
    streams: Sequence[Projection],
    turns: Turned,
) -> Any:
    """What the kernel computes, by the plain form."""
    made = plain(streams, turns, eps)
    if order is None:
        return made
    how, (parts, groups, group) = "b n (s g k) dim -> g s b n k dim", order
    each = (rearrange(x, how, s=parts, g=groups)[group] for x in made)
    return jnp.stack([*each], axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def joined_triton(
    plain: Form,
    eps: float,
    order: Order | None,
    interpret: bool,
    streams: Sequence[Projection],
    turns: Turned,
) -> Any:
    """What `plain` computes, in one pass on a GPU; `interpret` runs it anywhere.

    Args:
        order: of the heads in one array, `Sent`; None: all, in three arrays.
    """
    rows, _, _, heads, dim = streams[0].qkv.shape
    lengths = [stream.qkv.shape[1] for stream in streams]
    head = (lambda i: i) if order is None else functools.partial(order.head, heads)
    shape, each = (rows, sum(lengths), heads, dim), heads
    if order is not None:
        each = order.each(heads)
        shape = (order.parts, rows, sum(lengths), 3, each, dim)
    out = jax.ShapeDtypeStruct(shape, streams[0].qkv.dtype)

    def of_head(x: Any, *which: int) -> pl.BlockSpec:
        """All tokens of a head, of its queries, keys or values where they are joint."""
        block = (None, x.shape[1], *[None] * len(which), None, dim)
        return pl.BlockSpec(block, lambda i, n, b: (b, 0, *which, head(i), 0))

    def of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, n, b: (b, 0, 0))

    def bias(which: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, dim), lambda i, n, b: (which, head(i), 0))

    weight = pl.BlockSpec((dim,), lambda i, n, b: (0,))
    places = [
        Places(
            [of_head(x.qkv, i) for i in range(3)], [*map(bias, range(3))], [weight] * 2
        )
        for x in streams
    ]
    inputs = [Places([x.qkv] * 3, [x.bias] * 3, [*x[2:]]) for x in streams]
    joint = pl.BlockSpec(
        (None, None, sum(lengths), 3, None, dim),
        lambda i, n, b: (i // each, b, 0, 0, i % each, 0),
    )
    made = pl.pallas_call(
        functools.partial(joining_kernel, eps),
        out_shape=[out] * (3 if order is None else 1),
        grid=(
            each * (1 if order is None else order.parts),
            sum(pl.cdiv(n, TOKENS) for n in lengths),
            rows,
        ),
        in_specs=[places, [*map(of_row, turns)]],
        out_specs=[of_head(out)] * 3 if order is None else [joint],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name=joining_kernel.__name__,
    )(inputs, [*turns])
    return tuple(made) if order is None else made[0]


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
    for i in range(3):
        values = read(stream.tokens[i].at[here, :])
        values += stream.biases[i][...].astype(jnp.float32)[None]
        if i < len(stream.weights):
            mean = (values * values).sum(axis=1, keepdims=True) / dim
            weight = stream.weights[i][...].astype(jnp.float32)[None]
            values *= jax.lax.rsqrt(mean + eps) * weight
            values = _turned(values, cos, sin)
        joint = len(results) == 1
        where = (there, jnp.int32(i), slice(None)) if joint else (there, slice(None))
        result = results[0 if joint else i]
        plgpu.store(result.at[where], values.astype(result.dtype), mask=valid(dim))


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """`models.rotary.rotate`, in registers."""
    pairs = x.reshape(*cos.shape, 2)
    x, y = (part[..., 0] for part in jax.lax.split(pairs, (1, 1), axis=2))
    turned = (cos * x - sin * y)[..., None], (sin * x + cos * y)[..., None]
    return jnp.concatenate(turned, axis=2).reshape(x.shape[0], 2 * x.shape[1])


def _forward(
    plain: Form,
    eps: float,
    order: Order | None,
    interpret: bool,
    streams: Any,
    turns: Any,
) -> Any:
    out = joined_triton(plain, eps, order, interpret, streams, turns)
    return out, (streams, turns)


def _backward(
    plain: Form,
    eps: float,
    order: Order | None,
    interpret: bool,
    saved: Any,
    back: Any,
) -> Any:
    return jax.vjp(functools.partial(_in_order, plain, eps, order), *saved)[1](back)


joined_triton.defvjp(_forward, _backward)
