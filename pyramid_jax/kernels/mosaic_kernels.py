# SPDX-License-Identifier: Apache-2.0
"""The three kernels of `attention_mosaic`, as each of their computing warpgroups runs
them: `program` says which tokens are its own, rings bring those of the other side."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import Ref
from pyramid_jax.kernels.warpgroups import (
    ACROSS,
    DOWN,
    WIDE,
    Assignment,
    HopperProgram,
    Memory,
    load,
)

SUMS: Any = plgpu.WGMMAAccumulatorRef  # of a product, in registers
# Of the polynomial next to 2^x from -1/2 to 1/2, by relative error (Remez).
CUBIC = 0.05517167, 0.24261112, 0.69326099, 0.99992807
INTEGERS = 1.5 * 2.0**23  # added to a float32, it rounds to an integer in the last bits


def forward_groups(program: HopperProgram, work: Assignment) -> None:
    (keys, values), memory = work.rings, work.memory
    (q,) = program.load(work)
    first, last = map(program.down, work.numbers)
    count, size = program.listed(work.walk.count)[...], q.shape[0]
    slope, polynomial = program.call.slope, program.call.tiles.forward.polynomial

    def take_turn() -> None:
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        sums, peak, total = state
        k, rank = keys.blocks(at)
        logits = _product(q, k.T, then=take_turn)
        if partly:
            logits = _hide(logits, rank, first, last)
        keys.release(at)
        higher = jnp.maximum(peak, logits.max(axis=1) * slope)
        faded = jnp.exp2(peak - higher)
        powers = logits * slope - _rows(higher, logits)
        weights = jnp.exp2(powers) if partly else exp2(powers, polynomial)
        total = total * faded + weights.sum(axis=1)
        narrow = weights.astype(q.dtype)
        sums = sums * _rows(faded, sums)
        sums, higher, total, narrow = jax.lax.optimization_barrier(
            (sums, higher, total, narrow)
        )
        plgpu.barrier_arrive(memory.turn)
        (v,) = values.arrived(at)
        plgpu.barrier_wait(memory.turn)

        def next_keys() -> None:
            @pl.when(at + 1 < count)
            def _() -> None:
                keys.arrived(at + 1)

        sums = _added(program, memory, sums, (narrow, v), then=next_keys)
        values.release(at)
        return sums, higher, total

    @pl.when(count > 0)
    def _() -> None:
        keys.arrived(jnp.int32(0))

    pl.when(program.group == 1)(take_turn)
    state = _zeros(q.shape), _row(size, flash.FLOOR), _row(size, 0.0)
    sums, peak, total = _walked(program, visit, work.walk, state)
    pl.when(program.group == 0)(take_turn)
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    outs: Any = tuple(x for x in work.results if len(x.shape) == 4)
    out = outs if len(outs) > 1 else outs[0]
    parts = [(sums * _rows(1 / total, sums), q, out)]
    if memory.norm is not None:
        norm = jnp.where(blind, 0.0, peak + jnp.log(total) * math.log2(math.e))
        parts.append((norm, memory.norm.at[program.group], work.results[-1]))
    program.store(parts)


def query_groups(program: HopperProgram, work: Assignment) -> None:
    (keys, values), slope = work.rings, program.call.slope
    q, back = program.load(work)
    first, last, norm, along = map(program.down, work.numbers)

    def visit(partly: bool, at: Array, sums: Array) -> Array:
        (k, rank), (v,) = keys.arrived(at), values.arrived(at)

        def weigh(logits: Array) -> Array:
            if partly:
                logits = _hide(logits, rank, first, last)
            return jnp.exp2(logits * slope - _rows(norm, logits))

        weights, change = _products((q, k.T), (back, v.T), weigh)
        values.release(at)
        change = (weights * (change - _rows(along, change))).astype(q.dtype)
        sums = _added(program, work.memory, sums, (change, k))
        keys.release(at)
        return sums

    sums = _walked(program, visit, work.walk, _zeros(q.shape))
    program.store([(sums * (slope * math.log(2)), q, work.results[0])])


def key_groups(program: HopperProgram, work: Assignment) -> None:
    (queries, backs), slope = work.rings, program.call.slope
    k, v = program.load(work)
    first, last = map(program.down, work.numbers)

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        k_sums, v_sums = state
        (q, rank, norm), (back, along) = queries.arrived(at), backs.arrived(at)

        def weigh(logits: Array) -> Array:
            if partly:
                logits = _hide(logits, rank, first, last)
            less = load(norm, layout=ACROSS)
            return jnp.exp2(logits * slope - _columns(less, logits))

        weights, change = _products((k, q.T), (v, back.T), weigh)
        v_sums = _added(program, work.memory, v_sums, (weights.astype(k.dtype), back))
        along = load(along, layout=ACROSS)
        plgpu.commit_smem()
        backs.release(at)
        change = weights * (change - _columns(along, change))
        k_sums = _added(program, work.memory, k_sums, (change.astype(k.dtype), q))
        queries.release(at)
        return k_sums, v_sums

    nothing = _zeros(k.shape), _zeros(k.shape)
    k_sums, v_sums = _walked(program, visit, work.walk, nothing)
    dk, dv = work.results
    program.store([(k_sums * (slope * math.log(2)), k, dk), (v_sums, v, dv)])


def exp2(powers: Float[Array, "_ _"], columns: int) -> Float[Array, "_ _"]:
    """2^powers, in the first `columns` without the units for exponentials.

    There, powers are below 127, what is below -125 becomes that, and 2^x is computed as
    2^n p(x - n), n the integer next to x; the relative error is below 7.6e-5.
    """
    if not columns:
        return jnp.exp2(powers)
    others = jax.lax.slice(powers, (0, columns), powers.shape)
    first = jax.lax.slice(powers, (0, 0), (powers.shape[0], columns))
    first = jnp.maximum(first, -125.0)
    shifted = first + INTEGERS
    rest = (INTEGERS - shifted) + first  # XLA would leave out -INTEGERS + INTEGERS
    made = jnp.full_like(rest, CUBIC[0])
    for coefficient in CUBIC[1:]:
        made = made * rest + coefficient
    made, integer = (
        jax.lax.bitcast_convert_type(x, jnp.int32) for x in (made, shifted)
    )
    made = jax.lax.bitcast_convert_type(made + (integer << 23), jnp.float32)
    return jnp.concatenate([made, jnp.exp2(others)], axis=1)


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


def _hide(logits: Array, ranks: Ref, first: Array, last: Array) -> Array:
    """HIDDEN where a column's rank is outside of the row's interval."""
    rank = _columns(load(ranks, layout=ACROSS), logits)
    plgpu.commit_smem()
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
