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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pyramid_jax.kernels import flash, visits
from pyramid_jax.kernels.flash import KernelCall, Ref, Refs
from pyramid_jax.kernels.tiles import Tile, Tiles
from pyramid_jax.kernels.visits import BlockPairs, Mask, fill

LANES = 128
SUBLANES = 16  # of a tile of bfloat16; float32 has 8
MASK_ROWS = 8  # of a tile of int32; segment, frame and six unused

Lanes = Float[Array, "heads _ _"]  # heads, values of a token, tokens of all rows
Interpret = bool | pltpu.InterpretParams  # plainly, or with a TPU's memory emulated


class PairLists(NamedTuple):
    """The pairs of blocks that meet."""

    by_query: BlockPairs
    by_key: BlockPairs


class Grid(NamedTuple):
    """The mask as the kernels read it: segment and frame of tokens, pairs to walk."""

    query: Int[Array, "rows _"]
    key: Int[Array, "rows _"]
    lists: PairLists


def tpu_lists(query: Mask, key: Mask, tiles: Tiles) -> PairLists:
    """The lists of a mask, which serve every layer.

    Raises:
        ValueError: the tiles differ; the three kernels share one layout of tokens.
    """
    tile = _fitted(tiles, query[0].shape[1], key[0].shape[1]).forward
    kind = visits.kinds(query, key, tile.query, tile.key)
    return PairLists(visits.pairs(kind), visits.pairs(kind.mT))


def attention_tpu(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    sides: tuple[Mask, Mask],
    lists: PairLists,
    tiles: Tiles,
    *,
    interpret: Interpret = False,
) -> Float[Array, "b lq heads dim"]:
    """`kernels.attention.attend` on a TPU; `interpret` runs it anywhere, slowly.

    Args:
        sides: the masks of queries and keys, of which `tpu_lists` made the lists.
    """
    rows, length, _, dim = q.shape
    tiles = _fitted(tiles, length, k.shape[1])
    tile = tiles.forward
    out: Any = _attend(
        KernelCall(tiles, flash.slope_of_logits(dim), interpret),
        _lanes(q, tile.query),
        _lanes(k, tile.key),
        _lanes(v, tile.key),
        Grid(_identities(sides[0], tile.query), _identities(sides[1], tile.key), lists),
    )
    out = rearrange(out, "heads dim (b l) -> b l heads dim", b=rows)
    return out[:, :length, :, :dim]


def _fitted(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """The one tile of all kernels, no larger than needed for such queries and keys."""
    tile = tiles.forward
    if any((other.query, other.key) != (tile.query, tile.key) for other in tiles):
        raise ValueError(f"attention tiles {tiles} differ; pallas_tpu takes one tile")
    wide = (math.ceil(length / LANES) * LANES for length in (queries, keys))
    return Tiles(*[Tile(*map(min, (tile.query, tile.key), wide))] * 3)


def _lanes(x: Float[Array, "b _ heads dim"], size: int) -> Lanes:
    """The rows, filled to whole blocks, one after the other along the last axis."""
    x = fill(x, {1: size, 3: SUBLANES})
    return rearrange(x, "b l heads dim -> heads dim (b l)")


def _identities(mask: Mask, size: int) -> Int[Array, "rows _"]:
    """Segment and frame of every token, as two rows of one tile."""
    both = jnp.stack([x.ravel() for x in visits.fill_mask(mask, size)])
    return fill(both, {0: MASK_ROWS})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: KernelCall, q: Lanes, k: Lanes, v: Lanes, grid: Grid) -> Lanes:
    one, dim = [(q.shape, v.dtype)], q.shape[1]
    (out,) = _walk(call, _forward_kernel, grid, [q], [k, v], one, [dim, 1, 1])
    return out


def _forward(
    call: KernelCall, q: Lanes, k: Lanes, v: Lanes, grid: Grid
) -> tuple[Lanes, tuple]:
    heads, dim, tokens = q.shape
    both = [(q.shape, v.dtype), ((heads, 1, tokens), jnp.float32)]
    out, norm = _walk(call, _forward_kernel, grid, [q], [k, v], both, [dim, 1, 1])
    return out, (q, k, v, grid, out, norm)


def _backward(
    call: KernelCall, saved: tuple, back: Lanes
) -> tuple[Lanes, Lanes, Lanes, None]:
    q, k, v, grid, out, norm = saved
    along = (back.astype(jnp.float32) * out.astype(jnp.float32)).sum(1, keepdims=True)
    queries, keys, dim = [q, back, norm, along], [k, v], q.shape[1]
    one, both = [(q.shape, q.dtype)], [(x.shape, x.dtype) for x in keys]
    (dq,) = _walk(call, _query_kernel, grid, queries, keys, one, [dim])
    dk, dv = _walk(call, _key_kernel, grid, queries, keys, both, [dim, dim])
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _walk(
    call: KernelCall,
    kernel: Callable[..., None],
    grid: Grid,
    queries: Sequence[Array],
    keys: Sequence[Array],
    out: Sequence[tuple[tuple[int, ...], Any]],
    scratch: Sequence[int],
) -> Sequence[Array]:
    """Runs `kernel` on every pair of blocks that meets, for every head.

    It gets the slope, the lists of the pairs, and what is in memory of the own side, of
    the other side, of the results, and of what stays in VMEM from pair to pair.

    Args:
        out: shapes and types of the results, which are cut into blocks of the own side.
        scratch: rows of what stays, of a block's tokens each.
    """
    keys_own, tile = kernel is _key_kernel, call.tiles.forward
    walk = grid.lists.by_key if keys_own else grid.lists.by_query
    sides = [
        ([*queries, grid.query], tile.query),
        ([*keys, grid.key], tile.key),
    ]
    (own, size), (other, other_size) = sides[::-1] if keys_own else sides
    shapes = [jax.ShapeDtypeStruct(*each) for each in out]

    def block(x: Any, tokens: int, side: int) -> pl.BlockSpec:
        if x.ndim == 2:  # the mask: the same for all heads
            return pl.BlockSpec(
                (x.shape[0], tokens), lambda head, at, lists: (0, lists[side][at])
            )
        return pl.BlockSpec(
            (None, x.shape[1], tokens),
            lambda head, at, lists: (head, 0, lists[side][at]),
        )

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(shapes[0].shape[0], walk.count[0]),
        in_specs=[
            [block(x, size, 0) for x in own],
            [block(x, other_size, 1) for x in other],
        ],
        out_specs=[[block(x, size, 0) for x in shapes]],
        scratch_shapes=[[pltpu.VMEM((rows, size), jnp.float32) for rows in scratch]],
    )
    [results] = pl.pallas_call(
        functools.partial(kernel, call.slope),
        out_shape=[shapes],
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )((walk.own, walk.other, walk.kind), own, other)
    return results


def _forward_kernel(
    slope: float, walk: Refs, own: Refs, other: Refs, results: Refs, scratch: Refs
) -> None:
    q, query = own
    k, v, key = other
    out, *norms = results
    sums, peak, total = scratch

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
        mean, log_sum = flash.finish(sums[...], peak[...], total[...])
        for norm in norms:
            norm[...] = log_sum
        out[...] = mean.astype(out.dtype)

    _steps(walk, start, visit, stop)


def _query_kernel(
    slope: float, walk: Refs, own: Refs, other: Refs, results: Refs, scratch: Refs
) -> None:
    q, back, norm, along, query = own
    k, v, key = other
    (dq,), (sums,) = results, scratch

    def start() -> None:
        sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def visit(partly: bool) -> None:
        weights = flash.weigh(_logits(q, k, query, key, partly), slope, norm[...])
        change = weights * (flash.product(v[...], back[...], 0, 0) - along[...])
        sums[...] += flash.product(k[...], change.astype(k.dtype), 1, 0)

    def stop() -> None:
        dq[...] = (sums[...] * (slope * math.log(2))).astype(dq.dtype)

    _steps(walk, start, visit, stop)


def _key_kernel(
    slope: float, walk: Refs, own: Refs, other: Refs, results: Refs, scratch: Refs
) -> None:
    k, v, key = own
    q, back, norm, along, query = other
    dk, dv = results
    k_sums, v_sums = scratch

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

    _steps(walk, start, visit, stop)


def _steps(
    walk: Refs,
    start: Callable[[], None],
    visit: Callable[[bool], None],
    stop: Callable[[], None],
) -> None:
    """Starts at the first pair of an own block, visits each, stops after the last."""
    own, _, kind = walk
    at = pl.program_id(1)
    pl.when((at == 0) | (own[jnp.maximum(at - 1, 0)] != own[at]))(start)
    pl.when(kind[at] == visits.ALL)(lambda: visit(False))
    pl.when(kind[at] == visits.SOME)(lambda: visit(True))
    pl.when(own[at + 1] != own[at])(stop)


def _logits(
    q: Ref, k: Ref, query: Ref, key: Ref, partly: bool
) -> Float[Array, "keys queries"]:
    logits = flash.product(k[...], q[...], 0, 0)
    if not partly:
        return logits
    queries, keys = query[...], key[...].T  # keys are the rows of the logits
    return flash.hide(
        logits, (queries[0:1], queries[1:2]), (keys[:, 0:1], keys[:, 1:2])
    )
