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
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import KernelCall
from pyramid_jax.kernels.tiles import Tile, Tiles
from pyramid_jax.kernels.triton_kernels import (
    Program,
    forward_kernel,
    key_kernel,
    query_kernel,
)
from pyramid_jax.kernels.visits import Mask, VisitLists, Visits, fill, fill_mask

# JAX warns when a program with the kernel is lowered, after the call. Where warnings
# are errors, that would read as a refusal.
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)

Heads = Float[Array, "b _ heads _"]
Inputs = tuple[Heads, Heads, Heads]  # queries, keys and values


def attention_triton(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    sides: tuple[Mask, Mask],
    lists: VisitLists,
    tiles: Tiles,
    *,
    cut: int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "b _ heads dim"], ...]:
    """`kernels.attention.attend` on a GPU; `interpret` runs it anywhere, slowly.

    Args:
        sides: the masks of queries and keys, of which `visit_lists` made the lists.
        cut: the results of so many first queries are an array of their own, if that
            is a number of whole blocks.
    """
    dim = q.shape[3]
    wide = max(16, 1 << (dim - 1).bit_length())
    call = KernelCall(tiles, flash.slope_of_logits(dim), interpret)
    q, k, v = (fill(x, {3: wide}) for x in (q, k, v))
    whole = cut % tiles.forward.query == 0
    out: Any = _attend(call, cut if whole else 0, (q, k, v), sides, lists)
    out = out if whole or not cut else jnp.split(out[0], [cut], axis=1)
    return tuple(part[..., :dim] for part in out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    call: KernelCall, cut: int, qkv: Inputs, sides: tuple[Mask, Mask], lists: VisitLists
) -> tuple[Heads, ...]:
    return _outputs(call, cut, qkv, sides, lists.forward, [])


def _outputs(
    call: KernelCall,
    cut: int,
    qkv: Inputs,
    sides: tuple[Mask, Mask],
    walk: Visits,
    others: list[tuple[tuple[int, ...], Any]],
) -> tuple[Array, ...]:
    """What attention brings, in one array or two; and others, if they are wanted."""
    q, k, v = qkv
    queries, keys = Side([q], sides[0]), Side([k, v], sides[1])
    parts = [cut, q.shape[1] - cut] if cut else [q.shape[1]]
    out = [((len(q), n, *q.shape[2:]), v.dtype) for n in parts]
    both, tile = (queries, keys), call.tiles.forward
    return tuple(_run(call, forward_kernel, tile, both, walk, out + others))


def _forward(
    call: KernelCall, cut: int, qkv: Inputs, sides: tuple[Mask, Mask], lists: VisitLists
) -> tuple[tuple[Heads, ...], tuple]:
    q = qkv[0]
    filled = q.shape[1] + -q.shape[1] % call.tiles.forward.query
    sums = [((*q.shape[::2], filled, 1), jnp.float32)]
    *out, norm = _outputs(call, cut, qkv, sides, lists.forward, sums)
    norm = norm[:, :, : q.shape[1], 0]
    return tuple(out), (qkv, sides, lists, tuple(out), norm)


def _backward(
    call: KernelCall, cut: int, saved: tuple, back: tuple[Heads, ...]
) -> tuple[Inputs, None, None]:
    (q, k, v), sides, lists, out, norm = saved
    whole = jnp.concatenate(back, axis=1)
    along = jnp.einsum(
        "blhd,blhd->bhl",
        whole.astype(jnp.float32),
        jnp.concatenate(out, axis=1).astype(jnp.float32),
    )
    both = Side([q, whole], sides[0], [norm, along]), Side([k, v], sides[1])
    one, two = [(q.shape, q.dtype)], [(x.shape, x.dtype) for x in (k, v)]
    (dq,) = _run(call, query_kernel, call.tiles.query, both, lists.query, one)
    dk, dv = _run(call, key_kernel, call.tiles.key, both, lists.key, two)
    return (dq, dk, dv), None, None


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
    sides: tuple[Side, Side],
    lists: Visits,
    out: Sequence[tuple[tuple[int, ...], Any]],
) -> Sequence[Array]:
    """Runs `kernel` for every block of the own side, in every head and row.

    It gets the program, the lists, and what is in memory of the own side, of the other
    side, and of the results, whose shapes and types are `out`.
    """
    keys_own = kernel is key_kernel
    walk = lists._replace(whole=lists.whole[..., None], count=lists.count[..., None])
    sized = [(sides[0], tile.query), (sides[1], tile.key)]
    (own, size), (other, other_size) = sized[::-1] if keys_own else sized
    rows, length, heads = own.tokens[0].shape[:3]
    count = lists.block.shape[1]
    program = Program(call, size, other_size, count, length, last_first=not keys_own)

    def all_tokens(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, x.shape[1], None, x.shape[3]), lambda i, head, b: (b, 0, head, 0)
        )

    def all_of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, 1, x.shape[3]),
            lambda i, head, b: (b, min(1, x.shape[1] - 1) * head, 0, 0),
        )

    def result(x: Any) -> pl.BlockSpec:
        """The own block, or all tokens of a result that has only some of them."""
        of_tokens = x.shape[3] > 1
        return (all_tokens if of_tokens and x.shape[1] < length else program.block)(x)

    owned = [*own.tokens, *own.columns(size)]
    numbers = other.rows(other_size)
    shapes = [jax.ShapeDtypeStruct(*each) for each in out]
    [results] = pl.pallas_call(
        functools.partial(kernel, program),
        out_shape=[shapes],
        grid=(count, heads, rows),
        in_specs=[
            jax.tree.map(program.visited, walk),
            jax.tree.map(program.block, owned),
            [*map(all_tokens, other.tokens), *jax.tree.map(all_of_row, numbers)],
        ],
        out_specs=[[*map(result, shapes)]],
        compiler_params=plgpu.CompilerParams(
            num_warps=tile.warps, num_stages=tile.stages
        ),
        interpret=call.interpret,
        name=kernel.__name__,
    )(walk, owned, [*other.tokens, *numbers])
    return results
