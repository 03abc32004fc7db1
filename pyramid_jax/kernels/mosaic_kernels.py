# SPDX-License-Identifier: Apache-2.0
"""The three kernels of `attention_mosaic`, as each of their computing warpgroups runs
them: `program` says which tokens are its own, `rings` bring those of the other side."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import Ref, Refs
from pyramid_jax.kernels.warpgroups import (
    ACROSS,
    DOWN,
    WIDE,
    HopperProgram,
    Memory,
    Ring,
    load,
)

SUMS: Any = plgpu.WGMMAAccumulatorRef  # of a product, in registers


def forward_groups(
    program: HopperProgram,
    walk: Ref,
    rings: Sequence[Ring],
    own: Refs,
    results: Refs,
    memory: Memory,
) -> None:
    keys, values = rings
    (q,) = program.load(own[:1], memory)
    first, last = (program.down(x) for x in own[1:])
    count, stages = program.listed(walk.count)[...], keys.slots[0].shape[0]
    size, dim = q.shape
    slope = program.call.slope

    def take_turn() -> None:
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        sums, peak, total = state
        slot = jax.lax.rem(at, stages)
        k, rank = (x.at[slot] for x in keys.slots)
        logits = _product(q, k.T, then=take_turn)
        if partly:
            seen = load(rank, layout=ACROSS)
            plgpu.commit_smem()
            logits = _hide(logits, seen, first, last)
        keys.release(slot)
        higher = jnp.maximum(peak, logits.max(axis=1) * slope)
        faded = jnp.exp2(peak - higher)
        weights = jnp.exp2(logits * slope - _rows(higher, logits))
        total = total * faded + weights.sum(axis=1)
        narrow = weights.astype(q.dtype)
        sums = sums * _rows(faded, sums)
        sums, higher, total, narrow = jax.lax.optimization_barrier(
            (sums, higher, total, narrow)
        )
        plgpu.barrier_arrive(memory.turn)
        (v,) = values.arrived(slot)
        plgpu.barrier_wait(memory.turn)

        def next_keys() -> None:
            @pl.when(at + 1 < count)
            def _() -> None:
                keys.arrived(jax.lax.rem(at + 1, stages))

        sums = _added(program, memory, sums, (narrow, v), then=next_keys)
        values.release(slot)
        return sums, higher, total

    @pl.when(count > 0)
    def _() -> None:
        keys.arrived(jnp.int32(0))

    pl.when(program.group == 1)(take_turn)
    state = _zeros((size, dim)), _row(size, flash.FLOOR), _row(size, 0.0)
    sums, peak, total = _walked(program, visit, walk, state)
    pl.when(program.group == 0)(take_turn)
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    outs: Any = tuple(x for x in results if len(x.shape) == 4)
    out = outs if len(outs) > 1 else outs[0]
    parts = [(sums * _rows(1 / total, sums), q, out)]
    if memory.norm is not None:
        norm = jnp.where(blind, 0.0, peak + jnp.log(total) * math.log2(math.e))
        parts.append((norm, memory.norm.at[program.group], results[-1]))
    program.store(parts)


def query_groups(
    program: HopperProgram,
    walk: Ref,
    rings: Sequence[Ring],
    own: Refs,
    results: Refs,
    memory: Memory,
) -> None:
    keys, values = rings
    q, back = program.load(own[:2], memory)
    first, last, norm, along = (program.down(x) for x in own[2:])
    stages, slope = keys.slots[0].shape[0], program.call.slope

    def visit(partly: bool, at: Array, sums: Array) -> Array:
        slot = jax.lax.rem(at, stages)
        (k, rank), (v,) = keys.arrived(slot), values.arrived(slot)

        def weigh(logits: Array) -> Array:
            if partly:
                seen = load(rank, layout=ACROSS)
                plgpu.commit_smem()
                logits = _hide(logits, seen, first, last)
            return jnp.exp2(logits * slope - _rows(norm, logits))

        weights, change = _products((q, k.T), (back, v.T), weigh)
        values.release(slot)
        change = (weights * (change - _rows(along, change))).astype(q.dtype)
        sums = _added(program, memory, sums, (change, k))
        keys.release(slot)
        return sums

    sums = _walked(program, visit, walk, _zeros(q.shape))
    program.store([(sums * (slope * math.log(2)), q, results[0])])


def key_groups(
    program: HopperProgram,
    walk: Ref,
    rings: Sequence[Ring],
    own: Refs,
    results: Refs,
    memory: Memory,
) -> None:
    queries, backs = rings
    k, v = program.load(own[:2], memory)
    first, last = (program.down(x) for x in own[2:])
    stages, slope = queries.slots[0].shape[0], program.call.slope

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        k_sums, v_sums = state
        slot = jax.lax.rem(at, stages)
        (q, rank, norm), (back, along) = queries.arrived(slot), backs.arrived(slot)

        def weigh(logits: Array) -> Array:
            if partly:
                seeing = load(rank, layout=ACROSS)
                logits = _hide(logits, seeing, first, last)
            less = load(norm, layout=ACROSS)
            return jnp.exp2(logits * slope - _columns(less, logits))

        weights, change = _products((k, q.T), (v, back.T), weigh)
        v_sums = _added(program, memory, v_sums, (weights.astype(k.dtype), back))
        along = load(along, layout=ACROSS)
        plgpu.commit_smem()
        backs.release(slot)
        change = weights * (change - _columns(along, change))
        k_sums = _added(program, memory, k_sums, (change.astype(k.dtype), q))
        queries.release(slot)
        return k_sums, v_sums

    nothing = _zeros(k.shape), _zeros(k.shape)
    k_sums, v_sums = _walked(program, visit, walk, nothing)
    k_sums = k_sums * (slope * math.log(2))
    program.store([(k_sums, k, results[0]), (v_sums, v, results[1])])


def _walked(
    program: HopperProgram, visit: Callable[..., Any], walk: Ref, state: Any
) -> Any:
    """The state after the listed blocks: the wholly visible ones, then the others."""
    whole, count = (program.listed(x)[...] for x in (walk.whole, walk.count))
    state = jax.lax.fori_loop(0, whole, partial(visit, False), state)
    return jax.lax.fori_loop(whole, count, partial(visit, True), state)


def _product(x: Ref, y: Ref, then: Callable[[], None] = lambda: None) -> Array:
    """The product of two blocks; `then` happens while it is computed."""

    def multiply(sums: Ref) -> Array:
        plgpu.wgmma(sums, x, y)
        then()
        return sums[...]

    return pl.run_scoped(multiply, SUMS((x.shape[0], y.shape[1]), jnp.float32))


def _products(first: tuple[Ref, Ref], second: tuple[Ref, Ref], between: Any) -> Any:
    """`between(first product)` and the second product, computed meanwhile."""

    def multiply(one: Ref, other: Ref) -> tuple[Any, Array]:
        plgpu.wgmma(one, *first)
        plgpu.wgmma(other, *second)
        made = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
        return made, plgpu.wgmma_accumulator_load(other, wait_n=0)

    sums = [SUMS((x.shape[0], y.shape[1]), jnp.float32) for x, y in (first, second)]
    return pl.run_scoped(multiply, *sums)


def _added(
    program: HopperProgram,
    memory: Memory,
    sums: Array,
    product: tuple[Array, Ref],
    then: Callable[[], None] = lambda: None,
) -> Array:
    """The sums plus a product, whose left side is in registers."""
    x, y = product

    def multiply(total: Ref) -> None:
        plgpu.wgmma(total, x, y)
        then()

    if memory.spare is None:
        return pl.run_state(multiply)(SUMS.init(sums))
    spare = memory.spare.at[program.group]
    spare[...] = x
    plgpu.commit_smem()
    return sums + _product(spare, y, then)


def _hide(logits: Array, rank: Array, first: Array, last: Array) -> Array:
    """HIDDEN where a column's rank is outside of the row's interval."""
    rank = _columns(rank, logits)
    inside = (rank >= _rows(first, logits)) & (rank <= _rows(last, logits))
    return jnp.where(inside, logits, flash.HIDDEN)


def _rows(x: Array, like: Array) -> Array:
    return jax.lax.broadcast_in_dim(x, like.shape, [0])


def _columns(x: Array, like: Array) -> Array:
    return jax.lax.broadcast_in_dim(x, like.shape, [1])


def _zeros(shape: tuple[int, ...]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WIDE)


def _row(size: int, value: float) -> Array:
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), DOWN)
