# SPDX-License-Identifier: Apache-2.0
"""The warpgroups of a kernel for Hopper, and the memory through which they work.

A program has three warpgroups. Two compute, each for its own half of the program's
tokens; the third only starts copies. Blocks of the other side arrive in a ring of slots
in shared memory. A slot has two barriers: `full` opens when its copies have arrived,
`free` when both groups have read it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pyramid_jax.kernels.flash import KernelCall, Ref, Refs

GROUPS = 2  # that compute
# Of a thread that computes and of one that copies: together no more than the 168 that
# the compiler gives to each of 384, or a program would wait for ever for the others.
REGISTERS = 240, 24
GROUP, ROW, HEAD, BLOCK = "group", "row", "head", "block"  # axes of programs
WIDE = plgpu.Layout.WGMMA  # how a group holds a product in its registers
load: Any = plgpu.load  # whose arguments have changed since JAX 0.10
DOWN, ACROSS = WIDE.reduce(1), WIDE.reduce(0)  # a number per row of it, per column


class Ring(NamedTuple):
    """Arrays of the other side whose blocks arrive together, and their slots."""

    arrays: Refs
    slots: Refs
    full: Ref
    free: Ref

    def slot(self, visit: Array) -> Array:
        """The slot of a visit, numbered in the order of the list."""
        return jax.lax.rem(visit, self.slots[0].shape[0])

    def blocks(self, visit: Array) -> list[Ref]:
        """The blocks of a visit, which are there."""
        return [x.at[self.slot(visit)] for x in self.slots]

    def arrived(self, visit: Array) -> list[Ref]:
        """The blocks of a visit, once they are there."""
        plgpu.barrier_wait(self.full.at[self.slot(visit)])
        return self.blocks(visit)

    def release(self, visit: Array) -> None:
        """This group has read the blocks.

        What it read into registers, not by wgmma, has to be followed by `commit_smem`,
        or the next copy may overtake it.
        """
        plgpu.barrier_arrive(self.free.at[self.slot(visit)])


class Memory(NamedTuple):
    """Shared memory of a program beside its rings.

    `own` are blocks of both groups, `arrived` their barriers, `norm` is for log-sums,
    `turn` makes the groups take turns, and `spare` is where the interpreter puts what
    a GPU multiplies from registers; the last three are None where nobody needs them.
    """

    own: Refs
    arrived: Ref
    norm: Ref
    turn: Ref
    spare: Ref


class Assignment(NamedTuple):
    """What the warpgroups of a program have to do: the blocks to visit, the rings that
    bring them, own tokens and numbers of them, results, and memory beside the rings."""

    walk: Ref
    rings: Sequence[Ring]
    tokens: Refs
    numbers: Refs
    results: Refs
    memory: Memory


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
        return load(self.own(x), layout=DOWN, optimized=False)

    def load(self, work: Assignment) -> list[Ref]:
        """The blocks of own tokens, in shared memory."""
        arrived, blocks = work.memory.arrived.at[self.group], []
        for x, slots in zip(work.tokens, work.memory.own, strict=True):
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
    compute: Callable[[HopperProgram, Assignment], None],
    work: Assignment,
) -> None:
    """The body of a kernel: what each of the three warpgroups does."""

    @pl.when(program.group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        compute(program, work)

    @pl.when(program.group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        _feed(program, work.walk, work.rings)


def _feed(program: HopperProgram, walk: Ref, rings: Sequence[Ring]) -> None:
    """Copies the listed blocks into the rings, each when its slot is free.

    perf: the next entry of the list is read before the wait for a slot.
    """
    stages, count = rings[0].slots[0].shape[0], program.listed(walk.count)[...]
    blocks = program.listed(walk.block)

    def step(at: Array, block: Array) -> Array:
        following = blocks[at + 1]
        for ring in rings:
            slot = ring.slot(at)

            @pl.when(at >= stages)
            def _(barrier: Ref = ring.free.at[slot]) -> None:
                plgpu.barrier_wait(barrier)

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
                plgpu.barrier_wait(ring.free.at[ring.slot(at)])
