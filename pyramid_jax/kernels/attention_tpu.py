# SPDX-License-Identifier: Apache-2.0
"""Attention for TPUs (Pallas, Mosaic): one grid step per pair of blocks that meets.

The batch is laid out as one long row of blocks with the heads in front, `heads dim
tokens`. The mask gives the list of pairs (block of queries, block of keys). The list is
read before the kernel starts, and its length is that of the grid, so nothing is loaded
or run for a pair in which no query sees a key. The pairs of an output block are
consecutive: the output, the running peak and the running total stay in VMEM until the
block changes.

Tokens lie along the 128 lanes, in inputs, logits (keys x queries) and outputs alike.
Head widths below 128 therefore waste no lanes, what is kept per query is one row, and
sums over keys add registers instead of shuffling lanes. Two backward kernels recompute
the logits: one walks the pairs by queries (dq), one by keys (dk, dv).

Compiled for v5e, v5p and v6e (docs/kernels.md), run only by the interpreter.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import Ref
from pyramid_jax.kernels.tiles import Tile, Tiles, tiles_for
from pyramid_jax.kernels.visits import (
    ALL,
    SOME,
    BlockPairs,
    Mask,
    fill,
    fill_mask,
    kinds,
    pairs,
)

LANES = 128
SUBLANES = 16  # of a tile of bfloat16; float32 has 8
MASK_ROWS = 8  # of a tile of int32; segment, frame and six unused

Lanes = Float[Array, "heads _ _"]  # heads, values of a token, tokens of all rows
Interpret = bool | pltpu.InterpretParams  # plainly, or with a TPU's memory emulated


class Grid(NamedTuple):
    """The mask as the kernels read it: segment and frame of tokens, pairs to walk."""

    query: Int[Array, "rows _"]
    key: Int[Array, "rows _"]
    by_query: BlockPairs
    by_key: BlockPairs


@dataclass(frozen=True)
class TPUCall:
    """What is fixed while tracing."""

    tile: Tile
    slope: float
    interpret: Interpret


def attention_tpu(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    query: Mask,
    key: Mask,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Float[Array, "b lq heads dim"]:
    """`kernels.attention.attention` on a TPU; `interpret` runs it anywhere, slowly.

    Raises:
        ValueError: the tiles differ; the three kernels share one layout of tokens.
    """
    rows, length, _, dim = q.shape
    tiles = tiles or tiles_for("pallas_tpu", dim, q.dtype, k.shape[1])
    tile = _fitted(tiles, length, k.shape[1])
    kind = kinds(query, key, tile.query, tile.key)
    grid = Grid(
        _identities(query, tile.query),
        _identities(key, tile.key),
        pairs(kind),
        pairs(kind.mT),
    )
    out: Any = _attend(
        TPUCall(tile, flash.slope_of_logits(dim), interpret),
        _lanes(q, tile.query),
        _lanes(k, tile.key),
        _lanes(v, tile.key),
        grid,
    )
    out = rearrange(out, "heads dim (b l) -> b l heads dim", b=rows)
    return out[:, :length, :, :dim]


def _fitted(tiles: Tiles, queries: int, keys: int) -> Tile:
    """The tile of all kernels, no larger than needed for so many queries and keys."""
    tile = tiles.forward
    if any((other.query, other.key) != (tile.query, tile.key) for other in tiles):
        raise ValueError(f"attention tiles {tiles} differ; pallas_tpu takes one tile")
    wide = (math.ceil(length / LANES) * LANES for length in (queries, keys))
    return Tile(*map(min, (tile.query, tile.key), wide))


def _lanes(x: Float[Array, "b _ heads dim"], size: int) -> Lanes:
    """The rows, filled to whole blocks, one after the other along the last axis."""
    x = fill(x, {1: size, 3: SUBLANES})
    return rearrange(x, "b l heads dim -> heads dim (b l)")


def _identities(mask: Mask, size: int) -> Int[Array, "rows _"]:
    """Segment and frame of every token, as two rows of one tile."""
    both = jnp.stack([x.ravel() for x in fill_mask(mask, size)])
    return jnp.pad(both, ((0, MASK_ROWS - 2), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: TPUCall, q: Lanes, k: Lanes, v: Lanes, grid: Grid) -> Lanes:
    return _forward(call, q, k, v, grid)[0]


def _forward(
    call: TPUCall, q: Lanes, k: Lanes, v: Lanes, grid: Grid
) -> tuple[Lanes, tuple]:
    per_query = (q.shape[0], 1, q.shape[2])
    size, other = call.tile.query, call.tile.key
    out, norm = _walk(
        call,
        _forward_kernel,
        grid.by_query,
        own=(size, [q, grid.query]),
        other=(other, [k, v, grid.key]),
        out=[
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct(per_query, jnp.float32),
        ],
        scratch=[(q.shape[1], size), (1, size), (1, size)],
    )
    return out, (q, k, v, grid, out, norm)


def _backward(
    call: TPUCall, saved: tuple, back: Lanes
) -> tuple[Lanes, Lanes, Lanes, None]:
    q, k, v, grid, out, norm = saved
    along = (back.astype(jnp.float32) * out.astype(jnp.float32)).sum(1, keepdims=True)
    queries = (call.tile.query, [q, back, norm, along, grid.query])
    keys = (call.tile.key, [k, v, grid.key])
    (dq,) = _walk(
        call,
        _query_kernel,
        grid.by_query,
        own=queries,
        other=keys,
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[(q.shape[1], call.tile.query)],
    )
    dk, dv = _walk(
        call,
        _key_kernel,
        grid.by_key,
        own=keys,
        other=queries,
        out=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch=[(k.shape[1], call.tile.key)] * 2,
    )
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _walk(
    call: TPUCall,
    kernel: Callable[..., None],
    walk: BlockPairs,
    own: tuple[int, list[Array]],
    other: tuple[int, list[Array]],
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]],
) -> Sequence[Array]:
    """Runs `kernel` on every pair of the walk, for every head.

    Args:
        own, other: block size and arrays of the side that `walk` is ordered by, and of
            the other side; cut along the last axis.
        out: shapes of the results, which are cut into blocks of the own side.
        scratch: shapes of what stays in VMEM from pair to pair.
    """

    def blocks(x: Any, size: int, side: int) -> pl.BlockSpec:
        if x.ndim == 2:  # the mask: the same for all heads
            return pl.BlockSpec(
                (x.shape[0], size), lambda head, at, *lists: (0, lists[side][at])
            )
        return pl.BlockSpec(
            (None, x.shape[1], size),
            lambda head, at, *lists: (head, 0, lists[side][at]),
        )

    inputs = [(x, own[0], 0) for x in own[1]] + [(x, other[0], 1) for x in other[1]]
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(out[0].shape[0], walk.count),
        in_specs=[blocks(*each) for each in inputs],
        out_specs=[blocks(x, own[0], 0) for x in out],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    return pl.pallas_call(
        functools.partial(kernel, call.slope),
        out_shape=list(out),
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )(walk.own, walk.other, walk.kind, *(x for x, _, _ in inputs))


def _forward_kernel(
    slope: float,
    own: Ref,
    other: Ref,
    kind: Ref,
    q: Ref,
    query: Ref,
    k: Ref,
    v: Ref,
    key: Ref,
    out: Ref,
    norm: Ref,
    sums: Ref,
    peak: Ref,
    total: Ref,
) -> None:
    def start() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
        peak[...] = jnp.full(peak.shape, flash.FLOOR, peak.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)

    def visit(partly: bool) -> None:
        logits = _logits(q, k, query, key, partly)
        weights, faded, higher, added = flash.advance(
            logits, slope, peak[...], total[...], axis=0
        )
        peak[...], total[...] = higher, added
        sums[...] = sums[...] * faded + flash.product(
            v[...], weights.astype(v.dtype), 1, 0
        )

    def stop() -> None:
        mean, norm[...] = flash.finish(sums[...], peak[...], total[...])
        out[...] = mean.astype(out.dtype)

    _steps(own, kind, start, visit, stop)


def _query_kernel(
    slope: float,
    own: Ref,
    other: Ref,
    kind: Ref,
    q: Ref,
    back: Ref,
    norm: Ref,
    along: Ref,
    query: Ref,
    k: Ref,
    v: Ref,
    key: Ref,
    dq: Ref,
    sums: Ref,
) -> None:
    def start() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def visit(partly: bool) -> None:
        weights = flash.weigh(_logits(q, k, query, key, partly), slope, norm[...])
        change = weights * (flash.product(v[...], back[...], 0, 0) - along[...])
        sums[...] += flash.product(k[...], change.astype(k.dtype), 1, 0)

    def stop() -> None:
        dq[...] = (sums[...] * (slope * math.log(2))).astype(dq.dtype)

    _steps(own, kind, start, visit, stop)


def _key_kernel(
    slope: float,
    own: Ref,
    other: Ref,
    kind: Ref,
    k: Ref,
    v: Ref,
    key: Ref,
    q: Ref,
    back: Ref,
    norm: Ref,
    along: Ref,
    query: Ref,
    dk: Ref,
    dv: Ref,
    k_sums: Ref,
    v_sums: Ref,
) -> None:
    def start() -> None:
        k_sums[...] = jnp.zeros(k_sums.shape, k_sums.dtype)
        v_sums[...] = jnp.zeros(v_sums.shape, v_sums.dtype)

    def visit(partly: bool) -> None:
        weights = flash.weigh(_logits(q, k, query, key, partly), slope, norm[...])
        v_sums[...] += flash.product(back[...], weights.astype(back.dtype), 1, 1)
        change = weights * (flash.product(v[...], back[...], 0, 0) - along[...])
        k_sums[...] += flash.product(q[...], change.astype(q.dtype), 1, 1)

    def stop() -> None:
        dk[...] = (k_sums[...] * (slope * math.log(2))).astype(dk.dtype)
        dv[...] = v_sums[...].astype(dv.dtype)

    _steps(own, kind, start, visit, stop)


def _steps(
    own: Ref,
    kind: Ref,
    start: Callable[[], None],
    visit: Callable[[bool], None],
    stop: Callable[[], None],
) -> None:
    """Starts at the first pair of an own block, visits each, stops after the last."""
    at = pl.program_id(1)
    pl.when((at == 0) | (own[jnp.maximum(at - 1, 0)] != own[at]))(start)
    pl.when(kind[at] == ALL)(lambda: visit(False))
    pl.when(kind[at] == SOME)(lambda: visit(True))
    pl.when(own[at + 1] != own[at])(stop)


def _logits(
    q: Ref, k: Ref, query: Ref, key: Ref, partly: bool
) -> Float[Array, "keys queries"]:
    logits = flash.product(k[...], q[...], 0, 0)
    if not partly:
        return logits
    return jnp.where(_seen(query[...], key[...]), logits, flash.HIDDEN)


def _seen(
    query: Int[Array, "rows queries"], key: Int[Array, "rows keys"]
) -> Bool[Array, "keys queries"]:
    key = key.T  # keys are the rows of the logits
    return flash.seen(query[0:1], query[1:2], key[:, 0:1], key[:, 1:2])
