# SPDX-License-Identifier: Apache-2.0
"""The three kernels of `attention_mosaic`, as their warpgroups run them.

A program has three warpgroups. Two compute, each for its own half of the program's
tokens; the third only starts copies. Blocks of the other side arrive in a ring of slots
in shared memory. A slot has two barriers: `full` opens when its copies have arrived,
`free` when both groups have read it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import KernelCall, Ref, Refs

GROUPS = 2  # that compute
# Of a thread that computes and of one that copies: together no more than the 168 that
# the compiler gives to each of 384, or a program would wait for ever for the others.
REGISTERS = 240, 24
GROUP, ROW, HEAD, BLOCK = "group", "row", "head", "block"  # axes of programs
WIDE = plgpu.Layout.WGMMA  # how a group holds a product in its registers
DOWN, ACROSS = WIDE.reduce(1), WIDE.reduce(0)  # a number per row of it, per column


class Ring(NamedTuple):
    """Arrays of the other side whose blocks arrive together, and their slots."""

    arrays: Refs
    slots: Refs
    full: Ref
    free: Ref

    def arrived(self, slot: Array) -> list[Ref]:
        """The blocks in a slot, once they are there."""
        plgpu.barrier_wait(self.full.at[slot])
        return [x.at[slot] for x in self.slots]

    def release(self, slot: Array) -> None:
        """This group has read the slot.

        What it read into registers, not by wgmma, has to be followed by `commit_smem`,
        or the next copy may overtake it.
        """
        plgpu.barrier_arrive(self.free.at[slot])


class Memory(NamedTuple):
    """Shared memory of a program beside its rings.

    `own` are blocks of both groups, `arrived` their barriers, `norm` is for log-sums,
    `turn` makes the groups take turns, and `spare` is where the interpreter puts what
    a GPU multiplies from registers.
    """

    own: Refs
    arrived: Ref
    norm: Ref | None
    turn: Ref | None
    spare: Ref | None


class HopperProgram(NamedTuple):
    """What a warpgroup knows: its own `size` tokens, one of `count` pairs of such
    blocks in a row, and the blocks of `other_size` tokens that its program visits."""

    call: KernelCall
    size: int
    other_size: int
    count: int
    last_first: bool

    @property
    def group(self) -> Array:
        return jax.lax.axis_index(GROUP)

    @property
    def block(self) -> Array:
        """The program's block, of both groups."""
        at = jax.lax.axis_index(BLOCK)
        return self.count - 1 - at if self.last_first else at

    def listed(self, x: Ref) -> Ref:
        """The entry of the program's block in a list, a number or a row of them."""
        return x.at[jax.lax.axis_index(ROW), self.block]

    def tokens(self, x: Ref, start: Array, size: int) -> Ref:
        """A block of `b l heads dim`, of `b heads l`, or of `b l`."""
        row, head, here = *map(jax.lax.axis_index, (ROW, HEAD)), pl.ds(start, size)
        which = {4: (row, here, head), 3: (row, head, here), 2: (row, here)}
        return x.at[which[len(x.shape)]]

    @property
    def start(self) -> Array:
        """The first token of this group."""
        return (GROUPS * self.block + self.group) * self.size

    def own(self, x: Ref) -> Ref:
        """The tokens of this group."""
        return self.tokens(x, self.start, self.size)

    def down(self, x: Ref) -> Array:
        """A number of each own token, as rows of a product have them."""
        return plgpu.load(self.own(x), layout=DOWN, optimized=False)

    def load(self, arrays: Refs, memory: Memory) -> list[Ref]:
        """The blocks of own tokens, in shared memory."""
        arrived, blocks = memory.arrived.at[self.group], []
        for x, slots in zip(arrays, memory.own, strict=True):
            blocks.append(slots.at[self.group])
            plgpu.copy_gmem_to_smem(self.own(x), blocks[-1], arrived)
        plgpu.barrier_wait(arrived)
        return blocks

    def store(self, values: Sequence[tuple[Array, Ref, Ref]]) -> None:
        """Writes each value into shared memory, and from there into its array, or into
        one of two that are divided between blocks."""
        for value, block, _ in values:
            block[...] = value.astype(block.dtype)
        plgpu.commit_smem()
        for _, block, x in values:
            if isinstance(x, tuple):
                self._store_apart(block, *x)
            else:
                plgpu.copy_smem_to_gmem(block, self.own(x))
        plgpu.wait_smem_to_gmem(0)

    def _store_apart(self, block: Ref, before: Ref, after: Ref) -> None:
        cut = before.shape[1]

        @pl.when(self.start < cut)
        def _() -> None:
            plgpu.copy_smem_to_gmem(block, self.own(before))

        @pl.when(self.start >= cut)
        def _() -> None:
            there = self.tokens(after, self.start - cut, self.size)
            plgpu.copy_smem_to_gmem(block, there)


def run_groups(
    program: HopperProgram,
    compute: Callable[..., None],
    walk: Ref,
    rings: Sequence[Ring],
    *others: Any,
) -> None:
    """The body of a kernel: what each of the three warpgroups does."""

    @pl.when(program.group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        compute(program, walk, rings, *others)

    @pl.when(program.group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        _feed(program, walk, rings)


def _feed(program: HopperProgram, walk: Ref, rings: Sequence[Ring]) -> None:
    """Copies the listed blocks into the rings, each when its slot is free.

    perf: the next entry of the list is read before the wait for a slot.
    """
    stages, count = rings[0].slots[0].shape[0], program.listed(walk.count)[...]
    blocks = program.listed(walk.block)

    def step(at: Array, block: Array) -> Array:
        following, slot = blocks[at + 1], jax.lax.rem(at, stages)
        for ring in rings:

            @pl.when(at >= stages)
            def _(ring: Ring = ring) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            for x, slots in zip(ring.arrays, ring.slots, strict=True):
                source = program.tokens(
                    x, block * program.other_size, program.other_size
                )
                plgpu.copy_gmem_to_smem(source, slots.at[slot], ring.full.at[slot])
        return following

    jax.lax.fori_loop(0, count, step, blocks[0])
    # Nobody needs to wait for the last ones, but the interpreter wants it.
    for at in (count - stages + i for i in range(stages)):

        @pl.when(at >= 0)
        def _(at: Array = at) -> None:
            for ring in rings:
                plgpu.barrier_wait(ring.free.at[jax.lax.rem(at, stages)])


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
            seen = plgpu.load(rank, layout=ACROSS)
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
    outs = tuple(x for x in results if len(x.shape) == 4)
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
                seen = plgpu.load(rank, layout=ACROSS)
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
                seeing = plgpu.load(rank, layout=ACROSS)
                logits = _hide(logits, seeing, first, last)
            less = plgpu.load(norm, layout=ACROSS)
            return jnp.exp2(logits * slope - _columns(less, logits))

        weights, change = _products((k, q.T), (v, back.T), weigh)
        v_sums = _added(program, memory, v_sums, (weights.astype(k.dtype), back))
        along = plgpu.load(along, layout=ACROSS)
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

    return pl.run_scoped(multiply, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def _products(first: tuple[Ref, Ref], second: tuple[Ref, Ref], between: Any) -> Any:
    """`between(first product)` and the second product, computed meanwhile."""

    def multiply(one: Ref, other: Ref) -> tuple[Any, Array]:
        plgpu.wgmma(one, *first)
        plgpu.wgmma(other, *second)
        made = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
        return made, plgpu.wgmma_accumulator_load(other, wait_n=0)

    sums = [
        plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32) for x, y in (first, second)
    ]
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
        return pl.run_state(multiply)(plgpu.ACC.init(sums))
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
