# SPDX-License-Identifier: Apache-2.0
"""The three kernels of `attention_triton`, each a program for one own block.

They read and write references, in the memory of the GPU; how it is divided into blocks
is the business of `attention_triton`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import KernelCall, Ref, Refs

# 2^($1 · slope + $2); the slope is a literal, by its bits.
POWER = "{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{:08X}, $2; ex2.approx.ftz.f32 $0, x; }}"


class Program(NamedTuple):
    """What is fixed while the programs of one kernel are traced.

    Each owns a block of `size` tokens, one of `count` in a row of `length`, and walks
    blocks of `other_size` tokens. `last_first` is the order in which they start.
    """

    call: KernelCall
    size: int
    other_size: int
    count: int
    length: int
    last_first: bool

    def place(self, at: Any) -> Any:
        """The block of the program number `at`."""
        return self.count - 1 - at if self.last_first else at

    @property
    def first(self) -> Any:
        """The first token of the own block."""
        return self.place(pl.program_id(0)) * self.size

    def block(self, x: Any) -> pl.BlockSpec:
        """The own block of `b l heads dim`, of `b heads l 1`, or of `b 1 l 1`, which is
        the same for all heads."""
        if x.shape[3] > 1:
            return pl.BlockSpec(
                (None, self.size, None, x.shape[3]),
                lambda i, head, b: (b, self.place(i), head, 0),
            )
        return pl.BlockSpec(
            (None, None, self.size, 1),
            lambda i, head, b: (b, min(1, x.shape[1] - 1) * head, self.place(i), 0),
        )

    def visited(self, x: Any) -> pl.BlockSpec:
        """The list, or the number, of the own block: `b blocks _`."""
        return pl.BlockSpec(
            (None, None, x.shape[2]), lambda i, head, b: (b, self.place(i), 0)
        )

    def valid(self, shape: tuple[int, int]) -> Array:
        """Which tokens of an own block lie inside its row."""
        place = self.first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return place < self.length

    def tokens(self, block: Array) -> Any:
        """The tokens of a block of the other side."""
        return pl.ds(block * self.other_size, self.other_size)

    def weigh(self, logits: Array, slope: float, less: Array) -> Array:
        """`flash.weigh` in two instructions.

        perf: exp2 takes three more for results below the normal numbers, and the
        compiler does not join the product and the difference (docs/kernels.md).
        """
        if self.call.interpret:
            return flash.weigh(logits, slope, less)
        (weights,) = plgpu.elementwise_inline_asm(
            POWER.format(np.float32(slope).view(np.uint32)),
            args=[logits, jnp.broadcast_to(-less, logits.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(logits.shape, jnp.float32)],
        )
        return weights


def forward_kernel(
    program: Program, walk: Ref, own: Refs, other: Refs, results: Refs
) -> None:
    q, query = own
    k, v, key = other
    parts, norms = (
        [x for x in results if (x.shape[1] > 1) is wide] for wide in (True, False)
    )
    valid = program.valid(q.shape)
    queries = plgpu.load(q, mask=valid, other=0.0)
    who = [x[...] for x in query]

    def visit(partly: bool, block: Array, state: tuple) -> tuple:
        sums, peak, total = state
        here = program.tokens(block)
        keys, values = (_block(x, here, partly) for x in (k, v))
        logits = flash.product(queries, keys, 1, 1)
        if partly:
            logits = flash.hide(logits, who, [x[:, here] for x in key])
        weights, faded, peak, total = flash.advance(
            logits, program.call.slope, peak, total, axis=1, weigh=program.weigh
        )
        sums = sums * faded + flash.product(weights.astype(values.dtype), values, 1, 0)
        return sums, peak, total

    state = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((q.shape[0], 1), flash.FLOOR, jnp.float32),
        jnp.zeros((q.shape[0], 1), jnp.float32),
    )
    mean, log_sum = flash.finish(*_walked(visit, walk, state))
    for norm in norms:
        norm[...] = log_sum
    mean = mean.astype(parts[0].dtype)
    if len(parts) == 1:
        plgpu.store(parts[0], mean, mask=valid)
        return
    before, after = parts
    first, cut = program.first, before.shape[0]

    @pl.when(first < cut)
    def _() -> None:
        before[pl.ds(first, program.size), :] = mean

    @pl.when(first >= cut)
    def _() -> None:
        here = after.at[pl.ds(first - cut, program.size), :]
        plgpu.store(here, mean, mask=valid)


def query_kernel(
    program: Program, walk: Ref, own: Refs, other: Refs, results: Refs
) -> None:
    q, back, norm, along, query = own
    k, v, key = other
    (dq,) = results
    valid = program.valid(q.shape)
    queries = plgpu.load(q, mask=valid, other=0.0)
    backs = plgpu.load(back, mask=valid, other=0.0)
    norms, alongs = norm[...], along[...]
    who = [x[...] for x in query]

    def visit(partly: bool, block: Array, sums: Array) -> Array:
        here = program.tokens(block)
        keys, values = (_block(x, here, partly) for x in (k, v))
        logits = flash.product(queries, keys, 1, 1)
        if partly:
            logits = flash.hide(logits, who, [x[:, here] for x in key])
        weights = program.weigh(logits, program.call.slope, norms)
        change = weights * (flash.product(backs, values, 1, 1) - alongs)
        return sums + flash.product(change.astype(keys.dtype), keys, 1, 0)

    sums = _walked(visit, walk, jnp.zeros(q.shape, jnp.float32))
    sums = sums * (program.call.slope * math.log(2))
    plgpu.store(dq, sums.astype(dq.dtype), mask=valid)


def key_kernel(
    program: Program, walk: Ref, own: Refs, other: Refs, results: Refs
) -> None:
    k, v, key = own
    q, back, norm, along, query = other
    dk, dv = results
    valid = program.valid(k.shape)
    keys = plgpu.load(k, mask=valid, other=0.0)
    values = plgpu.load(v, mask=valid, other=0.0)
    who = [x[...] for x in key]

    def visit(partly: bool, block: Array, state: tuple) -> tuple:
        k_sums, v_sums = state
        here = program.tokens(block)
        queries, backs = (_block(x, here, partly) for x in (q, back))
        logits = flash.product(keys, queries, 1, 1)
        if partly:
            logits = flash.hide(logits, [x[:, here] for x in query], who)
        weights = program.weigh(logits, program.call.slope, norm[:, here])
        v_sums += flash.product(weights.astype(backs.dtype), backs, 1, 0)
        change = weights * (flash.product(values, backs, 1, 1) - along[:, here])
        k_sums += flash.product(change.astype(queries.dtype), queries, 1, 0)
        return k_sums, v_sums

    nothing = jnp.zeros(k.shape, jnp.float32)
    k_sums, v_sums = _walked(visit, walk, (nothing, nothing))
    k_sums = k_sums * (program.call.slope * math.log(2))
    plgpu.store(dk, k_sums.astype(dk.dtype), mask=valid)
    plgpu.store(dv, v_sums.astype(dv.dtype), mask=valid)


def _walked(visit: Callable[[bool, Array, Any], Any], walk: Ref, state: Any) -> Any:
    """The state after the listed blocks: the wholly visible ones, then the others.

    perf: the next entry of the list is read while the present block is multiplied.
    """

    def step(partly: bool, at: Array, carried: tuple[Array, Any]) -> tuple[Array, Any]:
        block, state = carried
        following = walk.block[at + 1]
        return following, visit(partly, block, state)

    whole, count = walk.whole[0], walk.count[0]
    carried = walk.block[0], state
    carried = jax.lax.fori_loop(0, whole, functools.partial(step, False), carried)
    return jax.lax.fori_loop(whole, count, functools.partial(step, True), carried)[1]


def _block(x: Ref, here: Any, may_end: bool) -> Array:
    """The tokens `here` of a row; zeros beyond its end."""
    tokens = x.at[here, :]
    if not may_end:
        return tokens[...]
    left = x.shape[0] - here.start
    valid = jax.lax.broadcasted_iota(jnp.int32, (here.size, x.shape[1]), 0) < left
    return plgpu.load(tokens, mask=valid, other=0.0)
