# SPDX-License-Identifier: Apache-2.0
"""Videos in pieces: in time, as a stream, in tiles, on many devices.

Everything here is about a *step*, a causal function of a piece of video:

    step(x, past) -> (y, past)

`past` is whatever the step must remember of what came before, None at a video's
beginning. How long the pieces are changes nothing but memory. A step that is compiled,
with its past donated, needs the memory of one piece.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pyramid_jax import sharding
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.latents import LatentConfig
from pyramid_jax.shapes import Array

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Pieces:
    """How much of a video is worked on at once, which changes only speed and memory.

    Tiles are the exception: they change colours a little, see `tiled`.

    Args:
        frames: pixel frames, a multiple of the latents' `temporal`; None: all.
        tile: height and width in pixels, a multiple of four latent cells; None: all.
        overlap: fraction of a tile that it shares with the next one.
    """

    frames: int | None = None
    tile: int | None = None
    overlap: float = 1 / 4


WHOLE = Pieces()


@dataclass(frozen=True)
class Codec:
    """A VAE as functions: from pixels to normalised latents, and back.

    Attributes:
        latent: sizes of latents, and the statistics that normalise them.
        encoder: step from pixels to moments of raw latents.
        posterior: raw latents from moments, and noise to draw them or None.
        decoder: step from raw latents to pixels.
        ranks: how many devices divide the frames of both steps, see `sharded`.
    """

    latent: LatentConfig
    encoder: Step
    posterior: Callable[[Any, Any], Any]
    decoder: Step
    ranks: int = 1

    def encode(
        self,
        pixels: Float[Array, "b f h w 3"],
        noise: Float[Array, "b t y x c"] | None = None,
        pieces: Pieces = WHOLE,
    ) -> Float[jax.Array, "b t y x c"]:
        """Normalised latents of videos that begin here.

        Args:
            pixels: in [-1, 1].
            noise: standard normal, to draw from the posterior; None takes its mode.

        Raises:
            ValueError: sizes that the latents, or the pieces, do not fit.
        """
        self.latent.frames(pixels.shape[1])
        self._small(pieces)
        scale = 1 / self.latent.spatial
        made = self._run(self.encoder, pixels, self.latent.temporal, scale, pieces)
        return self.latent.normalise(self.posterior(made, noise))

    def decode(
        self, latents: Float[Array, "b t y x c"], pieces: Pieces = WHOLE
    ) -> Float[jax.Array, "b f h w 3"]:
        """Pixels of whole videos, about -1 to 1, from normalised latents.

        Raises:
            ValueError: sizes that the latents, or the pieces, do not fit.
        """
        return _joined(self.decoded(latents, pieces))

    def decoded(
        self, latents: Float[Array, "b t y x c"], pieces: Pieces = WHOLE
    ) -> Iterator[Float[jax.Array, "b _ h w 3"]]:
        """What `decode` makes, piece after piece in time; of tiles, all at once.

        Raises:
            ValueError: sizes that the latents, or the pieces, do not fit.
        """
        raw = self.latent.denormalise(latents)
        small, scale = self._small(pieces), float(self.latent.spatial)
        if small.tile is None:
            return self._windows(self.decoder, raw, 1, small.frames)
        return iter([self._run(self.decoder, raw, 1, scale, small)])

    def stream(
        self, units: Iterable[Float[Array, "b _ y x c"]], pieces: Pieces = WHOLE
    ) -> Iterator[Float[jax.Array, "b _ h w 3"]]:
        """Pixels of each unit of one video, as soon as its latents are there.

        The first latent frame becomes one frame, each later one `latent.temporal`. The
        memory that is needed does not depend on the length of the video.

        Args:
            units: normalised, one latent frame or more each.
            pieces: its tiles; units are the pieces in time.
        """
        small, step = self._small(pieces), self.decoder
        if small.tile is not None:
            scale = float(self.latent.spatial)
            step = tiled_step(step, small.tile, scale, small.overlap)
        begins = itertools.chain([True], itertools.repeat(False))
        raw = (
            self.latent.denormalise(unit, start)
            for unit, start in zip(units, begins, strict=False)
        )
        return stream(step, raw)

    def _small(self, pieces: Pieces) -> Pieces:
        """The pieces in latent frames and cells; ValueError where they don't fit."""
        frames = _divided("frames", pieces.frames, self.latent.temporal)
        tile = _divided("tile", pieces.tile, self.latent.spatial)
        return Pieces(frames, tile, pieces.overlap)

    def _run(
        self, step: Step, x: Array, unit: int, scale: float, pieces: Pieces
    ) -> jax.Array:
        """What a step makes of whole videos, in `pieces` of x of whole units."""

        def one(x: Array) -> jax.Array:
            return _joined(self._windows(step, x, unit, pieces.frames))

        if pieces.tile is None:
            return one(x)
        return tiled(one, x, pieces.tile, scale, pieces.overlap)

    def _windows(
        self, step: Step, x: Array, unit: int, frames: int | None
    ) -> Iterator[jax.Array]:
        """What a step makes of whole videos, `frames` frames of x after another."""
        later = x.shape[1] - 1
        if later == 0 or (frames is None and self.ranks == 1):
            return iter([step(x, None)[0]])
        window = min(frames or later, later)
        return chunks(step, x, 1, _multiple(window, unit * self.ranks))


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
    """What the step makes of a whole video, working on `window` frames at once."""
    return _joined(chunks(step, x, first, window))


def chunks(
    step: Step, x: Float[Array, "b f h w c"], first: int, window: int
) -> Iterator[Float[jax.Array, "b _ _ _ _"]]:
    """What the step makes of a whole video, `window` frames after another.

    The last piece is filled up by repeating its last frame, which nothing earlier sees,
    so that one compiled step serves all pieces but the first.

    Args:
        first: frames of the first piece.
    """
    missing = (first - x.shape[1]) % window if x.shape[1] > first else 0
    if missing:
        x = jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1)
    last = -(-(x.shape[1] - first) // window)
    for i, made in enumerate(stream(step, windows(x, first, window))):
        if missing and i == last:
            made = made[:, : (window - missing) * made.shape[1] // window]
        yield made


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


def sharded(
    make: Callable[[Halo], Step],
    mesh: Mesh | AbstractMesh,
    cell: tuple[int, int] = (1, 1),
) -> Step:
    """The step that all devices of a mesh do together, each with its part of a video.

    Rows of the batch, frames and rows of pixels are divided as `sharding.RULES` says of
    "batch", "frames" and "height"; what can not be divided evenly is on all devices.
    The beginning of a video, which should be its first frame alone, is on all devices
    of "frames". Pasts are divided by batch and height.

    Args:
        make: the step for a part of a video, with the halo that connects it to others.
        cell: frames and rows that must stay together, e.g. (8, 8) of an encoder.
    """

    def run(x: Array, past: Any) -> tuple[jax.Array, Any]:
        rows, frames, height = x.shape[:3]
        units = 1 if past is None else frames // cell[0]
        axes = ("batch", "frames", "height")
        where = sharding.place((rows, units, height // cell[1]), axes, mesh).spec
        batch, time, height = (_if_divided(axis, mesh) for axis in where)
        step = make(Halo(time, height))
        parts, kept = P(batch, time, height), P(batch, None, height)
        divided = partial(jax.shard_map, mesh=mesh, out_specs=(parts, kept))
        if past is None:
            return divided(lambda x: step(x, None), in_specs=(parts,))(x)
        return divided(step, in_specs=(parts, kept))(x, past)

    return run


def _joined(parts: Iterable[jax.Array]) -> jax.Array:
    """One video of its pieces in time."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _if_divided(axis: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The axis of the mesh, or None if it has one device."""
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    return axis if math.prod(mesh.shape[name] for name in names) > 1 else None


def _divided(name: str, size: int | None, by: int) -> int | None:
    """`size` in units of `by`, if it is given.

    Raises:
        ValueError: it is no multiple.
    """
    if size is not None and (size < 1 or size % by):
        raise ValueError(
            f"pieces of {name} {size} are not a multiple of {by}; "
            f"use {max(size // by, 1) * by}"
        )
    return None if size is None else size // by


def _multiple(size: int, of: int) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // of) * of


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
