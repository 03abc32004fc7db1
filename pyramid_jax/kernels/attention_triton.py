# SPDX-License-Identifier: Apache-2.0
"""Attention for NVIDIA GPUs from Ampere on (Pallas, Triton): a program per own block.

A program owns one block of queries of one head and keeps it, the sums, the running peak
and the running total in registers while it walks the blocks of keys that the mask lists
for it: first those wholly visible, without mask arithmetic, then those in which the
mask has to be asked. Blocks that are not listed are never loaded. The compiler copies
the next blocks to shared memory while the present ones are multiplied (`stages`).
Programs with the longest lists, the last frames, start first.

Two backward kernels compute the logits again: one owns queries (dq), one owns keys and
walks queries (dk, dv); no atomics, so results do not vary. Rows are read in place, `b l
heads dim`; the end of a row is masked in the load, never padded in memory.

Pallas' Triton backend is deprecated since JAX 0.11; it is used in this file only.
Compiled for sm_80 and sm_90 (docs/kernels.md), run only by the interpreter.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pyramid_jax.kernels.flash import (
    FLOOR,
    HIDDEN,
    advance,
    finish,
    product,
    seen,
    slope_of_logits,
    weigh,
)
from pyramid_jax.kernels.tiles import Tile, Tiles, tiles_for
from pyramid_jax.kernels.visits import Mask, Visits, fill, kinds, visits

# 2^($1 · slope + $2); the slope is a literal, by its bits.
POWER = "{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{:08X}, $2; ex2.approx.ftz.f32 $0, x; }}"

Tokens = Float[Array, "b _ heads _"]
Ref = Any


@dataclass(frozen=True)
class Call:
    """What is fixed while tracing."""

    tiles: Tiles
    slope: float
    interpret: bool

    def weigh(self, logits: Array, slope: float, less: Array) -> Array:
        """`flash.weigh` in two instructions.

        perf: exp2 takes three more for results below the normal numbers, and the
        compiler does not join the product and the difference (docs/kernels.md).
        """
        if self.interpret:
            return weigh(logits, slope, less)
        (weights,) = plgpu.elementwise_inline_asm(
            POWER.format(np.float32(slope).view(np.uint32)),
            args=[logits, jnp.broadcast_to(-less, logits.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(logits.shape, jnp.float32)],
        )
        return weights


class Own(NamedTuple):
    """The blocks that programs own: how they are cut, and in which order they start."""

    size: int
    count: int
    last_first: bool

    def place(self, at: Any) -> Any:
        """The block of the program number `at`."""
        return self.count - 1 - at if self.last_first else at

    def tokens(self, x: Any) -> pl.BlockSpec:
        """A block of `b l heads dim`."""
        return pl.BlockSpec(
            (None, self.size, None, x.shape[3]),
            lambda i, head, b: (b, self.place(i), head, 0),
        )

    def column(self, x: Any) -> pl.BlockSpec:
        """A block of `b heads l 1`, or of the same for all heads, `b 1 l 1`."""
        return pl.BlockSpec(
            (None, None, self.size, 1),
            lambda i, head, b: (b, min(1, x.shape[1] - 1) * head, self.place(i), 0),
        )

    def visited(self, x: Any) -> pl.BlockSpec:
        """The list, or the number, that belongs to a block: `b blocks _`."""
        return pl.BlockSpec(
            (None, None, x.shape[2]), lambda i, head, b: (b, self.place(i), 0)
        )


def attention_triton(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    query: Mask,
    key: Mask,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "b lq heads dim"]:
    """`kernels.attention.attention` on a GPU; `interpret` runs it anywhere, slowly."""
    dim = q.shape[3]
    wide = max(16, 1 << (dim - 1).bit_length())
    more = ((0, 0), (0, 0), (0, 0), (0, wide - dim))
    tiles = tiles or tiles_for("pallas_triton", wide, q.dtype, k.shape[1])
    call = Call(tiles, slope_of_logits(dim), interpret)
    q, k, v = (jnp.pad(x, more) for x in (q, k, v))
    out: Any = _attend(call, q, k, v, query, key)
    return out[..., :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, q: Tokens, k: Tokens, v: Tokens, query: Mask, key: Mask
) -> Tokens:
    return _forward(call, q, k, v, query, key)[0]


def _forward(
    call: Call, q: Tokens, k: Tokens, v: Tokens, query: Mask, key: Mask
) -> tuple[Tokens, tuple]:
    tile = call.tiles.forward
    walk = visits(kinds(query, key, tile.query, tile.key))
    own = Own(tile.query, walk.block.shape[1], last_first=True)
    norm = jax.ShapeDtypeStruct(
        (*q.shape[::2], own.count * own.size, 1), dtype=jnp.float32
    )
    out, norm = _run(
        call,
        _forward_kernel,
        tile,
        own,
        walk,
        own_tokens=[q],
        own_columns=[_columns(query, tile.query)],
        tokens=[k, v],
        rows=[_rows(key, tile.key)],
        out=[(jax.ShapeDtypeStruct(q.shape, v.dtype), own.tokens), (norm, own.column)],
    )
    norm = norm[:, :, : q.shape[1], 0]
    return out, (q, k, v, query, key, out, norm)


def _backward(
    call: Call, saved: tuple, back: Tokens
) -> tuple[Tokens, Tokens, Tokens, None, None]:
    q, k, v, query, key, out, norm = saved
    along = jnp.einsum(
        "blhd,blhd->bhl", back.astype(jnp.float32), out.astype(jnp.float32)
    )
    tile = call.tiles.query
    walk = visits(kinds(query, key, tile.query, tile.key))
    own = Own(tile.query, walk.block.shape[1], last_first=True)
    (dq,) = _run(
        call,
        _query_kernel,
        tile,
        own,
        walk,
        own_tokens=[q, back],
        own_columns=[
            *(_even(x, tile.query)[..., None] for x in (norm, along)),
            _columns(query, tile.query),
        ],
        tokens=[k, v],
        rows=[_rows(key, tile.key)],
        out=[(jax.ShapeDtypeStruct(q.shape, q.dtype), own.tokens)],
    )
    tile = call.tiles.key
    walk = visits(kinds(query, key, tile.query, tile.key).mT)
    own = Own(tile.key, walk.block.shape[1], last_first=False)
    dk, dv = _run(
        call,
        _key_kernel,
        tile,
        own,
        walk,
        own_tokens=[k, v],
        own_columns=[_columns(key, tile.key)],
        tokens=[q, back],
        rows=[
            *(_even(x, tile.query)[:, :, None] for x in (norm, along)),
            _rows(query, tile.query),
        ],
        out=[(jax.ShapeDtypeStruct(x.shape, x.dtype), own.tokens) for x in (k, v)],
    )
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _columns(mask: Mask, size: int) -> Mask:
    """Segment and frame as `b 1 l 1`, filled to whole blocks."""
    segment, frame = _rows(mask, size)
    return segment.mT, frame.mT


def _rows(mask: Mask, size: int) -> Mask:
    """Segment and frame as `b 1 1 l`, filled to whole blocks."""
    segment, frame = (jnp.asarray(x, jnp.int32) for x in mask)
    return fill(segment, size, -1)[:, None, None], fill(frame, size, 0)[:, None, None]


def _even(x: Float[Array, "b heads _"], size: int) -> Float[Array, "b heads _"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size)))


def _run(
    call: Call,
    kernel: Callable[..., None],
    tile: Tile,
    own: Own,
    walk: Visits,
    *,
    own_tokens: Sequence[Array],
    own_columns: Sequence[Array | Mask],
    tokens: Sequence[Array],
    rows: Sequence[Array | Mask],
    out: Sequence[tuple[jax.ShapeDtypeStruct, Callable[[Any], pl.BlockSpec]]],
) -> Sequence[Array]:
    """Runs `kernel` for every own block of every head and row of the batch.

    Args:
        own_tokens, own_columns: what is cut into own blocks.
        tokens, rows: what a program loads by blocks as it walks.
        out: results, each with the way it is cut.
    """

    def all_tokens(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, x.shape[1], None, x.shape[3]), lambda i, head, b: (b, 0, head, 0)
        )

    def all_of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, 1, x.shape[3]),
            lambda i, head, b: (b, min(1, x.shape[1] - 1) * head, 0, 0),
        )

    lists = walk._replace(whole=walk.whole[..., None], count=walk.count[..., None])
    inputs = [
        (lists, own.visited),
        *((x, own.tokens) for x in own_tokens),
        *((x, own.column) for x in own_columns),
        *((x, all_tokens) for x in tokens),
        *((x, all_of_row) for x in rows),
    ]
    rows_of_batch, length, heads = own_tokens[0].shape[:3]
    return pl.pallas_call(
        functools.partial(kernel, call, tile, own, length),
        out_shape=[shape for shape, _ in out],
        grid=(own.count, heads, rows_of_batch),
        in_specs=[jax.tree.map(cut, x) for x, cut in inputs],
        out_specs=[cut(shape) for shape, cut in out],
        compiler_params=plgpu.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )(*(x for x, _ in inputs))


def _forward_kernel(
    call: Call,
    tile: Tile,
    own: Own,
    length: int,
    walk: Ref,
    q: Ref,
    query: tuple[Ref, Ref],
    k: Ref,
    v: Ref,
    key: tuple[Ref, Ref],
    out: Ref,
    norm: Ref,
) -> None:
    there = _there(own, length, q.shape)
    queries = plgpu.load(q, mask=there, other=0.0)
    segment, frame = query[0][...], query[1][...]

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        sums, peak, total = state
        keys, values = (_block(x, walk.block[at], tile.key, partly) for x in (k, v))
        logits = product(queries, keys, 1, 1)
        if partly:
            here = pl.ds(walk.block[at] * tile.key, tile.key)
            visible = seen(segment, frame, key[0][:, here], key[1][:, here])
            logits = jnp.where(visible, logits, HIDDEN)
        weights, faded, peak, total = advance(
            logits, call.slope, peak, total, axis=1, weigh=call.weigh
        )
        sums = sums * faded + product(weights.astype(values.dtype), values, 1, 0)
        return sums, peak, total

    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((own.size, 1), FLOOR, jnp.float32),
        jnp.zeros((own.size, 1), jnp.float32),
    )
    mean, norm[...] = finish(*_walked(visit, walk, state))
    plgpu.store(out, mean.astype(out.dtype), mask=there)


def _query_kernel(
    call: Call,
    tile: Tile,
    own: Own,
    length: int,
    walk: Ref,
    q: Ref,
    back: Ref,
    norm: Ref,
    along: Ref,
    query: tuple[Ref, Ref],
    k: Ref,
    v: Ref,
    key: tuple[Ref, Ref],
    dq: Ref,
) -> None:
    there = _there(own, length, q.shape)
    queries = plgpu.load(q, mask=there, other=0.0)
    backs = plgpu.load(back, mask=there, other=0.0)
    norms, alongs = norm[...], along[...]
    segment, frame = query[0][...], query[1][...]

    def visit(partly: bool, at: Array, sums: Array) -> Array:
        keys, values = (_block(x, walk.block[at], tile.key, partly) for x in (k, v))
        logits = product(queries, keys, 1, 1)
        if partly:
            here = pl.ds(walk.block[at] * tile.key, tile.key)
            visible = seen(segment, frame, key[0][:, here], key[1][:, here])
            logits = jnp.where(visible, logits, HIDDEN)
        weights = call.weigh(logits, call.slope, norms)
        change = weights * (product(backs, values, 1, 1) - alongs)
        return sums + product(change.astype(keys.dtype), keys, 1, 0)

    sums = _walked(visit, walk, jnp.zeros(q.shape, jnp.float32))
    plgpu.store(dq, (sums * (call.slope * math.log(2))).astype(dq.dtype), mask=there)


def _key_kernel(
    call: Call,
    tile: Tile,
    own: Own,
    length: int,
    walk: Ref,
    k: Ref,
    v: Ref,
    key: tuple[Ref, Ref],
    q: Ref,
    back: Ref,
    norm: Ref,
    along: Ref,
    query: tuple[Ref, Ref],
    dk: Ref,
    dv: Ref,
) -> None:
    there = _there(own, length, k.shape)
    keys = plgpu.load(k, mask=there, other=0.0)
    values = plgpu.load(v, mask=there, other=0.0)
    segment, frame = key[0][...], key[1][...]

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        k_sums, v_sums = state
        queries, backs = (
            _block(x, walk.block[at], tile.query, partly) for x in (q, back)
        )
        here = pl.ds(walk.block[at] * tile.query, tile.query)
        logits = product(keys, queries, 1, 1)
        if partly:
            visible = seen(query[0][:, here], query[1][:, here], segment, frame)
            logits = jnp.where(visible, logits, HIDDEN)
        weights = call.weigh(logits, call.slope, norm[:, here])
        v_sums += product(weights.astype(backs.dtype), backs, 1, 0)
        change = weights * (product(values, backs, 1, 1) - along[:, here])
        k_sums += product(change.astype(queries.dtype), queries, 1, 0)
        return k_sums, v_sums

    nothing = jnp.zeros(k.shape, jnp.float32)
    k_sums, v_sums = _walked(visit, walk, (nothing, nothing))
    k_sums = k_sums * (call.slope * math.log(2))
    plgpu.store(dk, k_sums.astype(dk.dtype), mask=there)
    plgpu.store(dv, v_sums.astype(dv.dtype), mask=there)


def _walked(visit: Callable[[bool, Array, Any], Any], walk: Ref, state: Any) -> Any:
    """The state after the listed blocks: the wholly visible ones, then the others."""
    whole, count = walk.whole[0], walk.count[0]
    state = jax.lax.fori_loop(0, whole, functools.partial(visit, False), state)
    return jax.lax.fori_loop(whole, count, functools.partial(visit, True), state)


def _there(own: Own, length: int, shape: tuple[int, int]) -> Array:
    """Where an own block lies inside its row."""
    first = own.place(pl.program_id(0)) * own.size
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < length


def _block(x: Ref, at: Array, size: int, may_end: bool) -> Array:
    """Block `at` of a row; zeros where the row has ended."""
    tokens = x.at[pl.ds(at * size, size), :]
    if not may_end:
        return tokens[...]
    left = x.shape[0] - at * size
    there = jax.lax.broadcasted_iota(jnp.int32, (size, x.shape[1]), 0) < left
    return plgpu.load(tokens, mask=there, other=0.0)
