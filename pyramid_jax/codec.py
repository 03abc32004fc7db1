# SPDX-License-Identifier: Apache-2.0
"""Videos in pieces: in time, as a stream, in tiles, on many devices.

Everything here is about a *step*, a causal function of a piece of video:

    step(x, past) -> (y, past)

`past` is whatever the step must remember of what came before, None at a video's
beginning. How long the pieces are changes nothing but memory. A step that is compiled,
with its past donated, needs the memory of one piece.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pyramid_jax.shapes import Array

Step = Callable[[Any, Any], tuple[Any, Any]]


def stream(step: Step, pieces: Iterable[Array]) -> Iterator[jax.Array]:
    """What the step makes of each piece of one video, as soon as the piece is there."""
    past = None
    for piece in pieces:
        made, past = step(piece, past)
        yield made


def windows(
    x: Float[Array, "b f h w c"], first: int, window: int
) -> Iterator[Float[Array, "b _ h w c"]]:
    """A video's pieces: `first` frames, then `window` each; the last has the rest."""
    yield x[:, :first]
    for begin in range(first, x.shape[1], window):
        yield x[:, begin : begin + window]


def chunked(
    step: Step, x: Float[Array, "b f h w c"], first: int, window: int
) -> Float[jax.Array, "b _ _ _ _"]:
    """What the step makes of a whole video, working on `window` frames at once.

    The last piece is filled up by repeating its last frame, which nothing earlier sees,
    so that one compiled step serves all pieces but the first.

    Args:
        first: frames of the first piece.
    """
    missing = (first - x.shape[1]) % window if x.shape[1] > first else 0
    if missing:
        x = jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1)
    made = list(stream(step, windows(x, first, window)))
    if missing:
        kept = (window - missing) * made[-1].shape[1] // window
        made[-1] = made[-1][:, :kept]
    return jnp.concatenate(made, axis=1)


def tiled(
    f: Callable[[Any], Any],
    x: Float[Array, "b f h w c"],
    tile: int,
    scale: float,
    overlap: float = 1 / 4,
) -> Float[jax.Array, "b _ _ _ _"]:
    """`f` of overlapping tiles of a video, blended; of the whole if that is one tile.

    Where tiles overlap, the weight of the later one rises linearly, first from the tile
    above to the one below it, then from left to right. A wider overlap hides seams
    better.

    Args:
        f: makes `scale` times as many rows and columns as it gets.
        tile: rows and columns of a tile of `x`; at the right and below they are cut.
        overlap: fraction of a tile that it shares with the next one, below 1.

    Raises:
        ValueError: tile or overlap are no whole numbers of rows on both sides.

    Source: the original's `tiled_encode` and `tiled_decode`.
    """
    step, keep, extent = _tiling(tile, scale, overlap)
    height, width = x.shape[2:4]
    if max(height, width) <= tile:
        return f(x)
    rows, above = [], []
    for top in range(0, height, step):
        row = []
        for left in range(0, width, step):
            made = f(x[:, :, top : top + tile, left : left + tile])
            if above:
                made = _blend(above[len(row)], made, extent, axis=2)
            if row:
                made = _blend(row[-1], made, extent, axis=3)
            row.append(made)
        kept = [part[:, :, :keep, :keep] for part in row]
        rows.append(jnp.concatenate(kept, axis=3))
        above = row
    return jnp.concatenate(rows, axis=2)


def tiled_step(step: Step, tile: int, scale: float, overlap: float = 1 / 4) -> Step:
    """A step that works on tiles, see `tiled`; its past is that of every tile."""

    def run(x: Array, past: Any) -> tuple[jax.Array, Any]:
        pasts, after = iter(past or ()), []

        def one(part: Array) -> jax.Array:
            made, new = step(part, next(pasts, None))
            after.append(new)
            return made

        return tiled(one, x, tile, scale, overlap), tuple(after)

    return run


def _tiling(tile: int, scale: float, overlap: float) -> tuple[int, int, int]:
    """Distance of tiles in, and distance and overlap out, in rows or columns."""
    step, made = round(tile * (1 - overlap)), round(tile * scale)
    keep = round(made * (1 - overlap))
    exact = math.isclose(tile * (1 - overlap), step) and math.isclose(
        step * scale, keep
    )
    if not 0 <= overlap < 1 or step < 1 or keep < 1 or not exact:
        unit = max(scale, 1 / scale)
        raise ValueError(
            f"tiles of {max(tile, made)} pixels with an overlap of {overlap:g} do not "
            f"begin at multiples of {unit:g} pixels; use a multiple of {4 * unit:g} "
            "pixels and an overlap of 0, 1/4, 1/2 or 3/4"
        )
    return step, keep, made - keep


@partial(jax.jit, static_argnames=("extent", "axis"))
def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, whose first rows fade in over the last ones of `before`."""
    size = min(extent, before.shape[axis], after.shape[axis])
    if not size:
        return after
    part = partial(jax.lax.slice_in_dim, axis=axis)
    shape = [1] * after.ndim
    shape[axis] = size
    weight = (jnp.arange(size, dtype=jnp.float32) / size).reshape(shape)
    old = part(before, before.shape[axis] - size, None).astype(jnp.float32)
    new = part(after, 0, size).astype(jnp.float32)
    mixed = (old * (1 - weight) + new * weight).astype(after.dtype)
    return jnp.concatenate([mixed, part(after, size, None)], axis=axis)
