# SPDX-License-Identifier: Apache-2.0
"""Attention for NVIDIA GPUs from Ampere on (Pallas, Triton): a program per own block.

A program owns one block of queries of one head and keeps it, the sums, the running peak
and the running total in registers while it walks the blocks of keys that the mask lists
for it: first those wholly visible, without mask arithmetic, then those to which the
mask has to be applied. Blocks that are not listed are never loaded. The compiler copies
the next blocks to shared memory while the present ones are multiplied (`stages`).
Programs with the longest lists, the last frames, start first.

Two backward kernels recompute the logits: one owns queries (dq), one owns keys and
walks queries (dk, dv). There are no atomics, so results do not vary. Rows are read in
place, `b l heads dim`; the end of a row is masked in the load, never padded in memory.

Pallas' Triton backend is deprecated since JAX 0.11, which says so whenever a kernel is
lowered; it is used in this file only, and the warning is silenced here.
Compiled for sm_80 and sm_90 (docs/kernels.md), run only by the interpreter.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import KernelCall, Ref, Refs
from pyramid_jax.kernels.tiles import Tile, Tiles, tiles_for
from pyramid_jax.kernels.visits import Mask, fill, fill_mask, kinds, visits

# JAX warns when a program with the kernel is lowered, after the call. Where warnings
# are errors, that would read as a refusal.
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)

# 2^($1 · slope + $2); the slope is a literal, by its bits.
POWER = "{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{:08X}, $2; ex2.approx.ftz.f32 $0, x; }}"

Heads = Float[Array, "b _ heads _"]


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
        first = self.place(pl.program_id(0)) * self.size
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < self.length

    def walked(self, walk: Ref, at: Array) -> Any:
        """The tokens of the block at position `at` of the list."""
        return pl.ds(walk.block[at] * self.other_size, self.other_size)

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


def attention_triton(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    query: Mask,
    key: Mask,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "b lq heads dim"]:
    """`kernels.attention.attention` on a GPU; `interpret` runs it anywhere, slowly."""
    dim = q.shape[3]
    wide = max(16, 1 << (dim - 1).bit_length())
    tiles = tiles or tiles_for("pallas_triton", wide, q.dtype, k.shape[1])
    call = KernelCall(tiles, flash.slope_of_logits(dim), interpret)
    q, k, v = (fill(x, {3: wide}) for x in (q, k, v))
    out: Any = _attend(call, q, k, v, query, key)
    return out[..., :dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: KernelCall, q: Heads, k: Heads, v: Heads, query: Mask, key: Mask
) -> Heads:
    return _forward(call, q, k, v, query, key)[0]


def _forward(
    call: KernelCall, q: Heads, k: Heads, v: Heads, query: Mask, key: Mask
) -> tuple[Heads, tuple]:
    tile = call.tiles.forward
    filled = q.shape[1] + -q.shape[1] % tile.query
    queries, keys = Side([q], query), Side([k, v], key)
    both = [(q.shape, v.dtype), ((*q.shape[::2], filled, 1), jnp.float32)]
    out, norm = _run(call, _forward_kernel, tile, queries, keys, both)
    norm = norm[:, :, : q.shape[1], 0]
    return out, (q, k, v, query, key, out, norm)


def _backward(
    call: KernelCall, saved: tuple, back: Heads
) -> tuple[Heads, Heads, Heads, None, None]:
    q, k, v, query, key, out, norm = saved
    along = jnp.einsum(
        "blhd,blhd->bhl", back.astype(jnp.float32), out.astype(jnp.float32)
    )
    queries, keys = Side([q, back], query, [norm, along]), Side([k, v], key)
    one, both = [(q.shape, q.dtype)], [(x.shape, x.dtype) for x in (k, v)]
    (dq,) = _run(call, _query_kernel, call.tiles.query, queries, keys, one)
    dk, dv = _run(call, _key_kernel, call.tiles.key, queries, keys, both)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


class Side(NamedTuple):
    """Queries or keys: arrays of tokens, `b l heads dim`, their mask, and numbers for
    each token and head, `b heads l`."""

    tokens: Sequence[Array]
    mask: Mask
    numbers: Sequence[Array] = ()

    def rows(self, size: int) -> list[Array | Mask]:
        """Numbers as `b heads 1 l`, mask as `b 1 1 l`, filled to whole blocks."""
        segment, frame = (jnp.asarray(x, jnp.int32)[:, None, None] for x in self.mask)
        numbers = [fill(x, {2: size})[:, :, None] for x in self.numbers]
        return [*numbers, fill_mask((segment, frame), size)]

    def columns(self, size: int) -> list[Array | Mask]:
        """The same with tokens along the third axis."""
        return jax.tree.map(lambda x: x.mT, self.rows(size))


def _run(
    call: KernelCall,
    kernel: Callable[..., None],
    tile: Tile,
    queries: Side,
    keys: Side,
    out: Sequence[tuple[tuple[int, ...], Any]],
) -> Sequence[Array]:
    """Runs `kernel` for every block of the own side, in every head and row.

    It gets the program, the lists, and what is in memory of the own side, of the other
    side, and of the results, whose shapes and types are `out`.
    """
    keys_own = kernel is _key_kernel
    sides = [(queries, tile.query), (keys, tile.key)]
    (own, size), (other, other_size) = sides[::-1] if keys_own else sides
    kind = kinds(queries.mask, keys.mask, tile.query, tile.key)
    walk = visits(kind.mT if keys_own else kind)
    lists = walk._replace(whole=walk.whole[..., None], count=walk.count[..., None])
    rows, length, heads = own.tokens[0].shape[:3]
    count = walk.block.shape[1]
    program = Program(call, size, other_size, count, length, last_first=not keys_own)

    def all_tokens(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, x.shape[1], None, x.shape[3]), lambda i, head, b: (b, 0, head, 0)
        )

    def all_of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, 1, x.shape[3]),
            lambda i, head, b: (b, min(1, x.shape[1] - 1) * head, 0, 0),
        )

    owned = [*own.tokens, *own.columns(size)]
    numbers = other.rows(other_size)
    shapes = [jax.ShapeDtypeStruct(*each) for each in out]
    [results] = pl.pallas_call(
        functools.partial(kernel, program),
        out_shape=[shapes],
        grid=(count, heads, rows),
        in_specs=[
            jax.tree.map(program.visited, lists),
            jax.tree.map(program.block, owned),
            [*map(all_tokens, other.tokens), *jax.tree.map(all_of_row, numbers)],
        ],
        out_specs=[[program.block(x) for x in shapes]],
        compiler_params=plgpu.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=call.interpret,
        name=kernel.__name__.strip("_"),
    )(lists, owned, [*other.tokens, *numbers])
    return results


def _forward_kernel(
    program: Program, walk: Ref, own: Refs, other: Refs, results: Refs
) -> None:
    q, query = own
    k, v, key = other
    out, norm = results
    valid = program.valid(q.shape)
    queries = plgpu.load(q, mask=valid, other=0.0)
    who = [x[...] for x in query]

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        sums, peak, total = state
        here = program.walked(walk, at)
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
    mean, norm[...] = flash.finish(*_walked(visit, walk, state))
    plgpu.store(out, mean.astype(out.dtype), mask=valid)


def _query_kernel(
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

    def visit(partly: bool, at: Array, sums: Array) -> Array:
        here = program.walked(walk, at)
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


def _key_kernel(
    program: Program, walk: Ref, own: Refs, other: Refs, results: Refs
) -> None:
    k, v, key = own
    q, back, norm, along, query = other
    dk, dv = results
    valid = program.valid(k.shape)
    keys = plgpu.load(k, mask=valid, other=0.0)
    values = plgpu.load(v, mask=valid, other=0.0)
    who = [x[...] for x in key]

    def visit(partly: bool, at: Array, state: tuple) -> tuple:
        k_sums, v_sums = state
        here = program.walked(walk, at)
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
    """The state after the listed blocks: the wholly visible ones, then the others."""
    whole, count = walk.whole[0], walk.count[0]
    state = jax.lax.fori_loop(0, whole, functools.partial(visit, False), state)
    return jax.lax.fori_loop(whole, count, functools.partial(visit, True), state)


def _block(x: Ref, here: Any, may_end: bool) -> Array:
    """The tokens `here` of a row; zeros beyond its end."""
    tokens = x.at[here, :]
    if not may_end:
        return tokens[...]
    left = x.shape[0] - here.start
    valid = jax.lax.broadcasted_iota(jnp.int32, (here.size, x.shape[1]), 0) < left
    return plgpu.load(tokens, mask=valid, other=0.0)
