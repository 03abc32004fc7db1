# SPDX-License-Identifier: Apache-2.0
"""Attention that visits only the blocks of queries and keys that see each other.

A row is cut into blocks of 64 tokens. The mask gives every block of queries the list of
the blocks of keys in which any query sees any key; a loop walks it with the running
softmax of flash attention (arXiv:2205.14135), and writes its output once. The weights
of a pair, 64 x 64 per head, stay in the cache; no array of queries times keys is
written. The backward pass computes the weights again, for every block of keys from the
queries that see it. This is plain JAX, differentiable once, for CPUs.

The savings depend on the row. In a packed training row of four segments 21 % of the
pairs are visible; forward and backward take 0.3 of the CPU time of the plain form
(benchmarks/cpu_vs_reference.py, 1442 tokens, 8 heads).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pyramid_jax.kernels.flash import FLOOR
from pyramid_jax.kernels.visits import Mask, fill, kinds, visits
from pyramid_jax.mask import TokenMask, visible

BLOCK = 64  # perf: of 32 to 256 the fastest (benchmarks/cpu_vs_reference.py)

Blocks = Float[Array, "_ heads size dim"]
Sums = tuple[Array, ...]


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
    kind = _kinds(query, key)

    def own_query(block: tuple) -> tuple[Array, Array]:
        q, own, met, count = block

        def visit(at: Array, state: Sums) -> Sums:
            j, (out, peak, total) = met[at], state
            seen = visible([x[:, None] for x in own], [_at(x, j)[None] for x in key])
            logits = jnp.where(seen, _product(q, _at(k, j).mT), FLOOR)
            higher = jnp.maximum(peak, logits.max(axis=-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(logits - higher), 0.0)
            faded = jnp.exp(peak - higher)
            return (
                out * faded + _product(weights, _at(v, j)),
                higher,
                total * faded + weights.sum(axis=-1, keepdims=True),
            )

        zero = jnp.zeros(q.shape, jnp.float32)
        none = zero[..., :1]
        out, peak, total = jax.lax.fori_loop(
            0, count, visit, (zero, jnp.full_like(none, FLOOR), none)
        )
        total = jnp.maximum(total, 1e-30)
        return out / total, peak + jnp.log(total)

    out, norm = jax.lax.map(own_query, (q, query, *_met(kind)))
    out, norm = (checkpoint_name(x, "attention") for x in (out, norm))
    return out.astype(v.dtype), (Row(q, k, v, query, key), kind, out, norm)


def _backward(saved: tuple, back: Blocks) -> tuple[Blocks, Blocks, Blocks, None, None]:
    row, kind, out, norm = saved
    back = back.astype(jnp.float32)
    # perf: keys stand in rows, so only one product transposes its weights.
    norm, along = norm.mT, (back * out).sum(axis=-1, keepdims=True).mT

    def own_key(dq: Array, block: tuple) -> tuple[Array, tuple[Array, Array]]:
        k, v, own, met, count = block

        def visit(at: Array, state: Sums) -> Sums:
            i, (dq, dk, dv) = met[at], state
            q, back_i = _at(row.q, i), _at(back, i)
            query = [_at(x, i)[None] for x in row.query]
            seen = visible(query, [x[:, None] for x in own])
            logits = _product(k, q.mT)
            weights = jnp.where(seen, jnp.exp(logits - _at(norm, i)), 0.0)
            slope = weights * (_product(v, back_i.mT) - _at(along, i))
            dq_i = _at(dq, i) + _product(slope.mT, k)
            return (
                jax.lax.dynamic_update_index_in_dim(dq, dq_i, i, 0),
                dk + _product(slope, q),
                dv + _product(weights, back_i),
            )

        zero = jnp.zeros(k.shape, jnp.float32)
        dq, *both = jax.lax.fori_loop(0, count, visit, (dq, zero, zero))
        return dq, tuple(both)

    blocks = row.k, row.v, row.key, *_met(kind.mT)
    dq, (dk, dv) = jax.lax.scan(own_key, jnp.zeros(row.q.shape, jnp.float32), blocks)
    dtype = row.v.dtype
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), None, None


_row.defvjp(_forward, _backward)


def _kinds(query: Mask, key: Mask) -> Int[Array, "1 _ _"]:
    """The kind of each pair of a block of queries and a block of keys."""
    size = key[0].shape[1]
    row, other = ([x.reshape(1, -1) for x in mask] for mask in (query, key))
    return kinds((row[0], row[1]), (other[0], other[1]), size, size)


def _met(kind: Int[Array, "1 _ _"]) -> tuple[Array, Array]:
    """The list of the blocks that each block meets, and how many these are."""
    block, _, count = visits(kind)
    return block[0], count[0]


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _at(x: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
