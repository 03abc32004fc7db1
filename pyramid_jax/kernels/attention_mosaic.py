# SPDX-License-Identifier: Apache-2.0
"""Attention for NVIDIA's Hopper GPUs (Pallas, Mosaic GPU): H100, H200.

A program owns a block of queries of one head and walks the blocks of keys that the mask
lists for it, as in `attention_triton`; what differs is who does what. One warpgroup
copies blocks to shared memory with the tensor memory accelerator (TMA), two multiply
them with wgmma, which reads operands in shared memory, and take turns: while one
computes its softmax, the other multiplies. Wholly visible blocks come first, without
mask arithmetic; in the others, the rank of each key is compared with the interval of
each query (`mask.ranks`). A row need not end with a block: TMA reads zeros beyond its
end, and writes nothing there. Only to a multiple of 8 tokens are rows filled.

Two backward kernels recompute the logits: one owns queries (dq), one owns keys and
walks queries (dk, dv). There are no atomics, so results do not vary.

Compiled for sm_90a and run by Pallas' interpreter, which looks for races; measured
nowhere yet (docs/kernels.md).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pyramid_jax.kernels import flash
from pyramid_jax.kernels.flash import KernelCall
from pyramid_jax.kernels.mosaic_kernels import (
    forward_groups,
    key_groups,
    query_groups,
)
from pyramid_jax.kernels.tiles import Tile, Tiles
from pyramid_jax.kernels.visits import (
    Mask,
    VisitLists,
    Visits,
    fill,
    fill_mask,
    visit_lists,
)
from pyramid_jax.kernels.warpgroups import (
    BLOCK,
    GROUP,
    GROUPS,
    HEAD,
    ROW,
    Assignment,
    HopperProgram,
    Memory,
    Ring,
    run_groups,
)
from pyramid_jax.mask import Ranks, TokenMask, ranks

# Of Pallas; without it, JAX is too old for the kernels, too.
INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)
EVEN = 8  # tokens: Pallas has TMA read no other number of them
SWIZZLE = 64  # features of two bytes in the 128 bytes that wgmma reads

Qkv = tuple[Array, Array, Array]  # queries, keys and values


class HopperLists(NamedTuple):
    """What the kernels visit, and the ranks of both sides, filled to whole blocks."""

    visits: VisitLists
    query: Ranks
    key: Ranks


def hopper_lists(query: Mask, key: Mask, tiles: Tiles) -> HopperLists:
    """The lists of a mask, which serve every layer."""
    most = max(max(tile.query, tile.key) for tile in tiles)
    both = (ranks(TokenMask(*fill_mask(mask, most))) for mask in (query, key))
    return HopperLists(visit_lists(query, key, tiles), *both)


def attention_mosaic(
    q: Float[Array, "b lq heads dim"],
    k: Float[Array, "b lk heads dim"],
    v: Float[Array, "b lk heads dim"],
    lists: HopperLists,
    tiles: Tiles,
    *,
    cut: int = 0,
    interpret: Any = False,
) -> tuple[Float[Array, "b _ heads dim"], ...]:
    """`kernels.attention.attend` on a Hopper GPU.

    Args:
        lists: `hopper_lists` made them, and `check_hopper` has passed the tiles.
        cut: the results of so many first queries are an array of their own, if that
            is a number of whole blocks of a warpgroup.
        interpret: True, or parameters of INTERPRETER, runs it anywhere, slowly.
    """
    length, dim = q.shape[1], q.shape[3]
    if interpret is True:
        interpret = INTERPRETER()
    call = KernelCall(tiles, flash.slope_of_logits(dim), interpret)
    filled = tuple(fill(x, {1: EVEN, 3: SWIZZLE}) for x in (q, k, v))
    whole = cut % (tiles.forward.query // GROUPS) == 0
    out: Any = _attend(call, cut if whole else 0, filled, lists)
    out = out if whole or not cut else jnp.split(out[0], [cut], axis=1)
    *before, last = (part[..., :dim] for part in out)
    return *before, last[:, : length - cut]


def check_hopper(dtype: str, tiles: Tiles) -> None:
    """Whether the kernels take such arrays in such blocks.

    Raises:
        ValueError: they don't, or JAX is too old.
    """
    if INTERPRETER is None:
        raise ValueError(
            f"JAX {jax.__version__} is too old for pallas_mosaic_gpu; install 0.11.2 "
            "or a later one, or use the backend 'pallas_triton'"
        )
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"pallas_mosaic_gpu takes bfloat16 and float16, not {dtype}; use the "
            "backend 'pallas_triton'"
        )
    for tile, own in zip(tiles, ("query", "query", "key"), strict=True):
        size, fixed = getattr(tile, own), tile.warps == 4 * GROUPS
        others, stages = tile.query + tile.key - size, tile.stages
        if size not in (128, 256) or others not in (64, 128) or not fixed or stages < 2:
            raise ValueError(
                "a tile of pallas_mosaic_gpu has 128 or 256 own tokens, 64 or 128 of "
                f"the other side, 2 stages or more, and {4 * GROUPS} warps, not "
                f"{tuple(tile)}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    call: KernelCall, cut: int, qkv: Qkv, lists: HopperLists
) -> tuple[Array, ...]:
    return tuple(_outputs(call, cut, qkv, lists, with_norm=False))


def _outputs(
    call: KernelCall, cut: int, qkv: Qkv, lists: HopperLists, with_norm: bool
) -> Sequence[Array]:
    """What attention brings, in one array or two, and the log-sum-exp of each query if
    it is wanted."""
    q, k, v = qkv
    parts = [cut, q.shape[1] - cut] if cut else [q.shape[1]]
    out: list[Any] = [((len(q), n, *q.shape[2:]), v.dtype) for n in parts]
    if with_norm:
        filled = lists.query.own.shape[1]
        out.append(((len(q), q.shape[2], filled), jnp.float32))
    own = Own([q], [lists.query.first, lists.query.own])
    rings = [k, lists.key.own], [v]
    return _run(call, forward_groups, own, rings, lists.visits.forward, out)


def _forward(
    call: KernelCall, cut: int, qkv: Qkv, lists: HopperLists
) -> tuple[tuple[Array, ...], tuple]:
    *out, norm = _outputs(call, cut, qkv, lists, with_norm=True)
    return tuple(out), (qkv, lists, tuple(out), norm)


def _backward(
    call: KernelCall, cut: int, saved: tuple, back: tuple[Array, ...]
) -> tuple[Qkv, None]:
    (q, k, v), lists, out, norm = saved
    whole, out = (jnp.concatenate(x, axis=1) for x in (back, out))
    along = jnp.einsum(
        "blhd,blhd->bhl", whole.astype(jnp.float32), out.astype(jnp.float32)
    )
    along = fill(along, {2: norm.shape[2]})
    own = Own([q, whole], [lists.query.first, lists.query.own, norm, along])
    rings, result = ([k, lists.key.own], [v]), [(q.shape, q.dtype)]
    (dq,) = _run(call, query_groups, own, rings, lists.visits.query, result)
    own = Own([k, v], [lists.key.own, lists.key.last])
    rings = [q, lists.query.own, norm], [whole, along]
    results = [(x.shape, x.dtype) for x in (k, v)]
    dk, dv = _run(call, key_groups, own, rings, lists.visits.key, results)
    return (dq, dk, dv), None


_attend.defvjp(_forward, _backward)


class Own(NamedTuple):
    """Arrays of own tokens, `b l heads dim`, and numbers of them, `b l` or
    `b heads l`."""

    tokens: Sequence[Array]
    numbers: Sequence[Array]


def _run(
    call: KernelCall,
    groups: Callable[..., None],
    own: Own,
    rings: Sequence[Sequence[Array]],
    walk: Visits,
    out: Sequence[tuple[tuple[int, ...], Any]],
) -> Sequence[Array]:
    """Runs a kernel for every block of own tokens, in every head and row.

    Args:
        rings: of each ring of shared memory, what it carries of the other side.
        out: shapes and types of the results.
    """
    tile, keys_own = _tile(call.tiles, groups), groups is key_groups
    size, other_size = (tile.query, tile.key)[:: -1 if keys_own else 1]
    rows, _, heads, dim = own.tokens[0].shape
    dtype, count = own.tokens[0].dtype, walk.block.shape[1]
    program = HopperProgram(call, size // GROUPS, other_size, count, not keys_own)
    turning, spare = groups is forward_groups, bool(call.interpret)
    norm = turning and len(out[-1][0]) == 3

    def kernel(*refs: Any) -> None:
        walk, numbers, tokens, arrays, *results, slots, barriers, memory = refs
        made = [Ring(*each) for each in zip(arrays, slots, *barriers, strict=True)]
        work = Assignment(walk, made, tokens, numbers, results, Memory(*memory))
        run_groups(program, groups, work)

    def slots(x: Array) -> Any:
        if x.ndim == 4:
            return _blocks(tile.stages, other_size, dim, dtype)
        return plgpu.SMEM((tile.stages, other_size), x.dtype)

    def barriers(arrivals: Callable[[Any], int]) -> list[Any]:
        return [
            plgpu.Barrier(num_arrivals=arrivals(ring), num_barriers=tile.stages)
            for ring in rings
        ]

    own_blocks = [_blocks(GROUPS, size // GROUPS, dim, dtype) for _ in own.tokens]
    memory = Memory(
        own_blocks,
        plgpu.Barrier(num_arrivals=len(own_blocks), num_barriers=GROUPS),
        plgpu.SMEM((GROUPS, size // GROUPS), jnp.float32) if norm else None,
        plgpu.Barrier(num_arrivals=GROUPS) if turning else None,
        _blocks(GROUPS, size // GROUPS, other_size, dtype) if spare else None,
    )
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*each) for each in out],
        grid=(rows, heads, count),
        grid_names=(ROW, HEAD, BLOCK),
        num_threads=GROUPS + 1,
        thread_name=GROUP,
        kernel_name=groups.__name__,
        scratch_types=[
            [[slots(x) for x in ring] for ring in rings],
            [barriers(len), barriers(lambda ring: GROUPS)],
            tuple(memory),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=call.interpret,
    )(walk, own.numbers, own.tokens, rings)


def _tile(tiles: Tiles, groups: Callable[..., None]) -> Tile:
    which = {forward_groups: "forward", query_groups: "query", key_groups: "key"}
    return getattr(tiles, which[groups])


def _blocks(count: int, size: int, width: int, dtype: Any) -> Any:
    """Blocks of tokens in shared memory, as wgmma reads them."""
    transforms = plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((count, size, width), dtype, transforms=transforms)
