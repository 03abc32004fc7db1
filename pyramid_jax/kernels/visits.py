# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys each block of queries has to visit, from the mask alone.

A row is cut into blocks of queries and blocks of keys. A pair of blocks is of one of
three kinds: no query sees any key (never loaded), every query sees every key (no mask
arithmetic), or some do (the mask is asked inside). All Pallas kernels walk lists made
here.

No token is compared with another. A block is summarised by the latest and the earliest
frame of each segment in it, and a query block meets a key block where for one segment
its latest frame is not before the other's earliest: blocks² x BUCKETS comparisons.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Int, Shaped

from pyramid_jax import shapes

# A `TokenMask` of either side; two of those in one signature would have one length.
Mask = tuple[shapes.Array, shapes.Array]
NONE, SOME, ALL = 0, 1, 2  # kinds of pairs of blocks
# Segments are told apart by their remainder; rows have fewer segments than this. With
# more, a pair may be visited in vain, and the mask inside the kernel hides it.
BUCKETS = 32
NEVER = jnp.iinfo(jnp.int32)


class Blocks(NamedTuple):
    """A mask cut into blocks."""

    segment: Int[Array, "b blocks size"]
    frame: Int[Array, "b blocks size"]


class Visits(NamedTuple):
    """For every block, the blocks that it meets, those wholly visible first.

    `block[b, i, :whole[b, i]]` are wholly visible, `block[b, i, whole:count]` partly.
    """

    block: Int[Array, "b _ _"]
    whole: Int[Array, "b _"]
    count: Int[Array, "b _"]


class Pairs(NamedTuple):
    """The pairs of blocks to walk, in the order of `own`, over all rows of a batch.

    Blocks are numbered through the batch. The first `count` entries count; `own` is -1
    after them and has one entry more. A block that meets none has one entry of kind
    NONE, so that its zeros are written; it names the block that is loaded already.
    """

    own: Int[Array, "_"]
    other: Int[Array, "_"]
    kind: Int[Array, "_"]
    count: Int[Array, ""]


def kinds(
    query: Mask, key: Mask, query_size: int, key_size: int
) -> Int[Array, "b _ _"]:
    """NONE, SOME or ALL for each block of queries and block of keys."""
    q, k = _blocks(query, query_size), _blocks(key, key_size)
    latest, earliest = _latest(q)[:, :, None], -_latest(_backwards(k))[:, None]
    some = (latest >= earliest).any(axis=-1)
    q_low, q_high = q.segment.min(axis=-1), q.segment.max(axis=-1)
    k_low, k_high = k.segment.min(axis=-1), k.segment.max(axis=-1)
    q_one = jnp.where(q_low == q_high, q_low, -1)  # the block's only segment
    k_one = jnp.where(k_low == k_high, k_low, -1)
    same = (q_one[:, :, None] == k_one[:, None]) & (q_one >= 0)[:, :, None]
    before = k.frame.max(axis=-1)[:, None] <= q.frame.min(axis=-1)[:, :, None]
    return jnp.where(same & before, ALL, jnp.where(some, SOME, NONE)).astype(jnp.int32)


def visits(kind: Int[Array, "b _ _"]) -> Visits:
    """The list of every block of the first side."""
    return Visits(
        jnp.argsort(-kind, axis=-1, stable=True).astype(jnp.int32),
        (kind == ALL).sum(axis=-1, dtype=jnp.int32),
        (kind != NONE).sum(axis=-1, dtype=jnp.int32),
    )


def pairs(kind: Int[Array, "b _ _"]) -> Pairs:
    """One list for the whole batch, by blocks of the first side."""
    rows, _, others = kind.shape
    meets = kind != NONE
    alone = ~meets.any(axis=-1, keepdims=True)
    listed = meets | (alone & (jnp.arange(others) == 0)[None, None])
    order = jnp.argsort(~listed.ravel(), stable=True).astype(jnp.int32)
    entry = jnp.arange(order.size, dtype=jnp.int32)
    count = listed.sum(dtype=jnp.int32)
    own = jnp.where(entry < count, order // others, -1)
    other = order % others + order // (kind.size // rows) * others
    kind = kind.ravel()[order]
    loaded = jax.lax.cummax(jnp.where(kind == NONE, 0, entry))
    return Pairs(jnp.append(own, -1), other[loaded], kind, count)


def fill(x: Shaped[Array, "*b _"], size: int, value: int) -> Shaped[Array, "*b _"]:
    """The last axis continued with `value` up to a multiple of `size`."""
    more = (0, -x.shape[-1] % size)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [more], constant_values=value)


def _blocks(mask: Mask, size: int) -> Blocks:
    """The mask in blocks, with padding at the end."""
    segment, frame = (jnp.asarray(x, jnp.int32) for x in mask)
    filled = fill(segment, size, -1), fill(frame, size, 0)
    return Blocks(
        *(rearrange(x, "b (blocks size) -> b blocks size", size=size) for x in filled)
    )


def _backwards(cut: Blocks) -> Blocks:
    return Blocks(cut.segment, -cut.frame)


def _latest(cut: Blocks) -> Int[Array, "b blocks _"]:
    """The latest frame of each segment in each block."""
    bucket = jnp.where(cut.segment < 0, -1, cut.segment % BUCKETS)
    here = bucket[..., None] == jnp.arange(BUCKETS)[None, None, None]
    # One off the limit, so that its negative exists and absence never meets absence.
    return jnp.where(here, cut.frame[..., None], NEVER.min + 2).max(axis=2)
