# SPDX-License-Identifier: Apache-2.0
"""Attention that visits only the blocks of queries and keys that see each other.

A row is cut into blocks of 64 tokens. The mask gives a list of the pairs (query block,
key block) in which any query sees any key; a loop walks it with the running softmax of
flash attention (arXiv:2205.14135). The weights of a pair, 64 x 64 per head, stay in the
cache; no array of queries times keys is written. The backward pass walks the same list
and computes the weights again. This is plain JAX, differentiable once, for CPUs.

The savings depend on the row. In a packed training row of four segments 21 % of the
pairs are visible; forward and backward take 0.3 of the CPU time of the plain form
(benchmarks/cpu_vs_reference.py, 1442 tokens, 8 heads).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pyramid_jax.kernels.flash import FLOOR
from pyramid_jax.kernels.visits import BlockPairs, Mask, fill, kinds, pairs
from pyramid_jax.mask import TokenMask, visible

BLOCK = 64  # perf: of 32 to 256 the fastest (benchmarks/cpu_vs_reference.py)

Blocks = Float[Array, "_ heads size dim"]


class Row(NamedTuple):
    """One row of a batch in blocks; queries are divided by the square root of dim."""

    q: Blocks
    k: Blocks
    v: Blocks
    query: Mask  # blocks x size
    key: Mask


def blocks(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    query: Mask,
    key: Mask,
    size: int = BLOCK,
) -> Float[Array, "b lq heads dim"]:
    """`kernels.attention.attend`, row after row."""
    length, dim = q.shape[1], q.shape[-1]

    def cut(x: Array) -> Array:
        pattern = "b (blocks size) heads dim -> b blocks heads size dim"
        return rearrange(fill(x, {1: size}), pattern, size=size)

    def cut_mask(mask: Mask) -> Any:
        pattern = "b (blocks size) -> b blocks size"
        filled = (fill(x, {1: size}, -1) for x in mask)
        return TokenMask(*(rearrange(x, pattern, size=size) for x in filled))

    row = Row(cut(q * dim**-0.5), cut(k), cut(v), cut_mask(query), cut_mask(key))
    out = jax.lax.map(lambda row: _row(*row), row)
    out = rearrange(out, "b blocks heads size dim -> b (blocks size) heads dim")
    return out[:, :length]


@jax.custom_vjp
def _row(q: Blocks, k: Blocks, v: Blocks, query: Mask, key: Mask) -> Blocks:
    return _forward(q, k, v, query, key)[0]


def _forward(
    q: Blocks, k: Blocks, v: Blocks, query: Mask, key: Mask
) -> tuple[Blocks, tuple]:
    row, met = Row(q, k, v, query, key), _pairs(query, key)

    def visit(at: Array, state: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        i, j = met.own[at], met.other[at]
        out, peak, total = (_at(x, i) for x in state)
        logits, seen = _logits(row, i, j)
        logits = jnp.where(seen, logits, FLOOR)
        higher = jnp.maximum(peak, logits.max(axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - higher), 0.0)
        faded = jnp.exp(peak - higher)
        new = (
            out * faded + _product(weights, _at(row.v, j)),
            higher,
            total * faded + weights.sum(axis=-1, keepdims=True),
        )
        return tuple(_put(x, value, i) for x, value in zip(state, new, strict=True))

    zero = jnp.zeros(q.shape, jnp.float32)
    none = zero[..., :1]
    out, peak, total = jax.lax.fori_loop(
        0, met.count[0], visit, (zero, jnp.full_like(none, FLOOR), none)
    )
    total = jnp.maximum(total, 1e-30)
    out = out / total
    return out.astype(v.dtype), (row, met, out, peak + jnp.log(total))


def _backward(saved: tuple, back: Blocks) -> tuple[Blocks, Blocks, Blocks, None, None]:
    row, met, out, norm = saved
    back = back.astype(jnp.float32)
    along = (back * out).sum(axis=-1, keepdims=True)

    def visit(at: Array, state: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        i, j = met.own[at], met.other[at]
        back_i, (dq, dk, dv) = _at(back, i), state
        logits, seen = _logits(row, i, j)
        weights = jnp.where(seen, jnp.exp(logits - _at(norm, i)), 0.0)
        slope = weights * (_product(back_i, _at(row.v, j).mT) - _at(along, i))
        return (
            _put(dq, _at(dq, i) + _product(slope, _at(row.k, j)), i),
            _put(dk, _at(dk, j) + _product(slope.mT, _at(row.q, i)), j),
            _put(dv, _at(dv, j) + _product(weights.mT, back_i), j),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in row[:3])
    dq, dk, dv = jax.lax.fori_loop(0, met.count[0], visit, zeros)
    dtype = row.v.dtype
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), None, None


_row.defvjp(_forward, _backward)


def _pairs(query: Mask, key: Mask) -> BlockPairs:
    """The pairs of blocks in which any query sees any key."""
    size = key[0].shape[1]
    row, other = ([x.reshape(1, -1) for x in mask] for mask in (query, key))
    return pairs(kinds((row[0], row[1]), (other[0], other[1]), size, size))


def _logits(row: Row, i: Array, j: Array) -> tuple[Array, Array]:
    """Products of the queries of block i and the keys of block j, and their mask."""
    query = [_at(x, i)[:, None] for x in row.query]
    key = [_at(x, j)[None] for x in row.key]
    return _product(_at(row.q, i), _at(row.k, j).mT), visible(query, key)


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _at(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _put(x: Array, value: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)
