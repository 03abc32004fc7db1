# SPDX-License-Identifier: Apache-2.0
"""The blocks of keys that each block of queries has to visit, from the mask alone.

A row is cut into blocks of queries and blocks of keys. A pair of blocks is of one of
three kinds: no query sees any key (never loaded), every query sees every key (no mask
arithmetic), or some do (the kernel applies the mask). All Pallas kernels walk lists
made here.

No token is compared with another. A block is summarised by the latest and the earliest
frame of each segment in it, and a query block meets a key block where for one segment
its latest frame is not before the other's earliest: blocks² x BUCKETS comparisons.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, Shaped

from pyramid_jax import shapes
from pyramid_jax.kernels.tiles import Tile, Tiles

# The `TokenMask` of one side; as such, both sides of a signature would be equally long.
Mask = tuple[shapes.Array, shapes.Array]
NONE, SOME, ALL = 0, 1, 2  # kinds of pairs of blocks
# Segments are told apart by their remainder; rows have fewer segments than this. With
# more, a pair may be visited in vain, and the mask inside the kernel hides it.
BUCKETS = 32


class Visits(NamedTuple):
    """For every block, the blocks that it meets; those wholly visible come first.

    `block[b, i, :whole[b, i]]` are wholly visible, `block[b, i, whole:count]` partly.
    """

    block: Int[Array, "b _ _"]
    whole: Int[Array, "b _"]
    count: Int[Array, "b _"]


class VisitLists(NamedTuple):
    """What each of the three kernels of a GPU visits."""

    forward: Visits
    query: Visits
    key: Visits


class BlockPairs(NamedTuple):
    """The pairs of blocks to walk, in the order of `own`, over all rows of a batch.

    Blocks are numbered through the batch. Only the first `count` entries are walked;
    `own` is -1 after them and has one entry more. A block that meets none has one entry
    of kind NONE, so that its zeros are written; it names the block that is loaded
    already.
    """

    own: Int[Array, "_"]
    other: Int[Array, "_"]
    kind: Int[Array, "_"]
    count: Int[Array, "1"]


def kinds(
    query: Mask, key: Mask, query_size: int, key_size: int
) -> Int[Array, "b _ _"]:
    """The kind (NONE, SOME or ALL) of each pair of a query block and a key block."""
    q, q_frame = _blocks(query, query_size)
    k, k_frame = _blocks(key, key_size)
    latest = _latest(q, q_frame)[:, :, None]
    earliest = -_latest(k, -k_frame)[:, None]
    some = (latest >= earliest).any(axis=-1)
    q_low, q_high = q.min(axis=-1), q.max(axis=-1)
    k_low, k_high = k.min(axis=-1), k.max(axis=-1)
    q_one = jnp.where(q_low == q_high, q_low, -1)  # the block's only segment
    k_one = jnp.where(k_low == k_high, k_low, -1)
    same = (q_one[:, :, None] == k_one[:, None]) & (q_one >= 0)[:, :, None]
    before = k_frame.max(axis=-1)[:, None] <= q_frame.min(axis=-1)[:, :, None]
    return jnp.where(same & before, ALL, jnp.where(some, SOME, NONE)).astype(jnp.int32)


def visits(kind: Int[Array, "b _ _"]) -> Visits:
    """The list that each block of the first side visits."""
    return Visits(
        jnp.argsort(-kind, axis=-1, stable=True).astype(jnp.int32),
        (kind == ALL).sum(axis=-1, dtype=jnp.int32),
        (kind != NONE).sum(axis=-1, dtype=jnp.int32),
    )


def visit_lists(query: Mask, key: Mask, tiles: Tiles) -> VisitLists:
    """The lists of a mask, which serve every layer."""

    def of(tile: Tile, keys_own: bool = False) -> Visits:
        kind = kinds(query, key, tile.query, tile.key)
        walk = visits(kind.mT if keys_own else kind)
        # A loop reads the next entry before it knows whether there is one.
        block = jnp.pad(walk.block, ((0, 0), (0, 0), (0, 1)))
        return walk._replace(block=block)

    return VisitLists(of(tiles.forward), of(tiles.query), of(tiles.key, keys_own=True))


def pairs(kind: Int[Array, "b _ _"]) -> BlockPairs:
    """One list for the whole batch, ordered by blocks of the first side."""
    rows, _, others = kind.shape
    meets = kind != NONE
    alone = ~meets.any(axis=-1, keepdims=True)
    listed = meets | (alone & (jnp.arange(others, dtype=jnp.int32) == 0)[None, None])
    order = jnp.argsort(~listed.ravel(), stable=True).astype(jnp.int32)
    entry = jnp.arange(order.size, dtype=jnp.int32)
    count = listed.sum(dtype=jnp.int32, keepdims=True).ravel()
    own = jnp.where(entry < count, order // others, -1)
    other = order % others + order // (kind.size // rows) * others
    kind = kind.ravel()[order]
    loaded = jax.lax.cummax(jnp.where(kind == NONE, 0, entry))
    return BlockPairs(jnp.append(own, -1), other[loaded], kind, count)


def fill(
    x: Shaped[Array, "..."], multiples: Mapping[int, int], value: int = 0
) -> Shaped[Array, "..."]:
    """Continues axes with `value` up to a multiple of the size given for each."""
    widths = [(0, 0)] * x.ndim
    for axis, size in multiples.items():
        widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, constant_values=value)


def fill_mask(mask: Mask, size: int) -> Mask:
    """A mask continued with padding, along the last axis, to whole blocks."""
    segment, frame = (jnp.asarray(x, jnp.int32) for x in mask)
    return fill(segment, {-1: size}, -1), fill(frame, {-1: size})


def _blocks(mask: Mask, size: int) -> list[Int[Array, "b blocks {size}"]]:
    """The segments and the frames in blocks, with padding at the end."""
    pattern = "b (blocks size) -> b blocks size"
    return [rearrange(x, pattern, size=size) for x in fill_mask(mask, size)]


def _latest(
    segment: Int[Array, "b blocks size"], frame: Int[Array, "b blocks size"]
) -> Int[Array, "b blocks _"]:
    """The latest frame of each segment in each block."""
    bucket = jnp.where(segment < 0, -1, segment % BUCKETS)
    member = bucket[..., None] == jnp.arange(BUCKETS, dtype=jnp.int32)[None, None, None]
    # One off the limit, so that its negative exists and absence never meets absence.
    never = jnp.iinfo(jnp.int32).min + 2
    return jnp.where(member, frame[..., None], never).max(axis=2)
