# SPDX-License-Identifier: Apache-2.0
"""Videos in pieces: in time, as a stream, in tiles, on many devices.

Everything here works on a *step*, a causal function of a piece of a video:

    step(x, past) -> (y, past)

`past` is what the step must remember of the pieces before, None at the beginning of a
video. The length of the pieces changes nothing but memory. A step that is compiled,
with its past donated, needs the memory of one piece.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from pyramid_jax import sharding
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.shapes import Array

CodecStep = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Pieces:
    """The part of a video that is worked on at once; it changes only speed and memory.

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
    encoder: CodecStep
    posterior: Callable[[Any, Any], Any]
    decoder: CodecStep
    ranks: int = 1

    def encode(
        self,
        pixels: Float[Array, "b f h w 3"],
        noise: Float[Array, "b t y x c"] | None = None,
        pieces: Pieces = WHOLE,
    ) -> Float[jax.Array, "b t y x c"]:
        """Normalised latents of whole videos.

        Args:
            pixels: in [-1, 1].
            noise: standard normal, to draw from the posterior; None takes its mode.

        Raises:
            ValueError: sizes that the latents, or the pieces, do not fit.
        """
        self.latent.frames(pixels.shape[1])
        self._in_cells(pieces)

        def encoded(x: Array) -> jax.Array:
            unit = self.latent.temporal
            return _joined(self._windows(self.encoder, x, pieces.frames, unit))

        scale = 1 / self.latent.spatial
        moments = tiled(encoded, pixels, pieces.tile, scale, pieces.overlap)
        return self.latent.normalise(self.posterior(moments, noise))

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
        """The pixels of `decode`, piece after piece in time; with tiles, all at once.

        Raises:
            ValueError: sizes that the latents, or the pieces, do not fit.
        """
        raw, cells = self.latent.denormalise(latents), self._in_cells(pieces)
        windows = partial(self._windows, self.decoder, frames=cells.frames)
        if cells.tile is None:
            return windows(raw)
        scale, overlap = self.latent.spatial, cells.overlap
        return iter(
            [tiled(lambda x: _joined(windows(x)), raw, cells.tile, scale, overlap)]
        )

    def stream(
        self, units: Iterable[Float[Array, "b _ y x c"]], pieces: Pieces = WHOLE
    ) -> Iterator[Float[jax.Array, "b _ h w 3"]]:
        """Pixels of each unit of one video, as soon as its latents are there.

        The first latent frame becomes one frame, each later one `latent.temporal`. The
        memory that is needed does not depend on the length of the video.

        Args:
            units: normalised, one latent frame or more each.
            pieces: longer units are worked on in so many frames at once.
        """
        return map(self.incremental(pieces), units)

    def incremental(
        self, pieces: Pieces = WHOLE
    ) -> Callable[[Float[Array, "b _ y x c"]], Float[jax.Array, "b _ h w 3"]]:
        """The function that `stream` applies to one unit of a video after another."""
        cells = self._in_cells(pieces)
        step = tiled_step(self.decoder, cells.tile, self.latent.spatial, cells.overlap)
        past = None

        def decode(unit: Array) -> jax.Array:
            nonlocal past
            raw, results = self.latent.denormalise(unit, begins=past is None), []
            window = cells.frames or raw.shape[1]
            first = 1 if past is None and window < raw.shape[1] else window
            ends = [*range(first, raw.shape[1], window), raw.shape[1]]
            for start, end in pairwise([0, *ends]):
                pixels, past = step(raw[:, start:end], past)
                results.append(pixels)
            return _joined(results)

        return decode

    def _in_cells(self, pieces: Pieces) -> Pieces:
        """The pieces in latent frames and cells.

        Raises:
            ValueError: they are not whole numbers of them.
        """
        units = {"frames": self.latent.temporal, "tile": self.latent.spatial}
        for name, unit in units.items():
            size = getattr(pieces, name)
            if size is None:
                continue
            if size < unit or size % unit:
                raise ValueError(
                    f"pieces of {name} {size} are not a multiple of {unit}; "
                    f"use {max(size // unit, 1) * unit}"
                )
            pieces = replace(pieces, **{name: size // unit})
        return pieces

    def _windows(
        self, step: CodecStep, x: Array, frames: int | None, unit: int = 1
    ) -> Iterator[jax.Array]:
        """The step's results for whole videos, `frames` frames of x after another.

        Args:
            unit: frames of x that must stay together.
        """
        whole = frames is None and self.ranks == 1
        later = max(1, x.shape[1] - 1)
        shared = unit * self.ranks
        window = -(-min(frames or later, later) // shared) * shared
        return chunks(step, x, x.shape[1] if whole else 1, window)


def pixel_codec(latent: LatentConfig) -> Codec:
    """The codec of latents that are normalised pixels."""

    def unchanged(x: Array, past: Any) -> tuple[jax.Array, Any]:
        return jnp.asarray(x), ()

    return Codec(latent, unchanged, lambda moments, noise: moments, unchanged)


def stream(step: CodecStep, pieces: Iterable[Array]) -> Iterator[jax.Array]:
    """The step's result for each piece of one video, as soon as the piece is there."""
    past = None
    for piece in pieces:
        result, past = step(piece, past)
        yield result


def chunked(
    step: CodecStep, x: Float[Array, "b f h w c"], first: int, window: int
) -> Float[jax.Array, "b _ _ _ _"]:
    """The step's result for a whole video, made of `window` frames at once."""
    return _joined(chunks(step, x, first, window))


def chunks(
    step: CodecStep, x: Float[Array, "b f h w c"], first: int, window: int
) -> Iterator[Float[jax.Array, "b _ _ _ _"]]:
    """The step's result for a whole video, `window` frames after another.

    The last piece is filled up by repeating its last frame, which nothing earlier sees,
    so that one compiled step serves all pieces but the first.

    Args:
        first: frames of the first piece.
    """
    missing = (first - x.shape[1]) % window if x.shape[1] > first else 0
    if missing:
        x = jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1)
    ends = [*range(first, x.shape[1], window), x.shape[1]]
    pieces = (x[:, start:end] for start, end in pairwise([0, *ends]))
    for end, result in zip(ends, stream(step, pieces), strict=True):
        if missing and end == x.shape[1]:
            result = result[:, : (window - missing) * result.shape[1] // window]
        yield result


def tiled(
    f: Callable[[Any], Any],
    x: Float[Array, "b f h w c"],
    tile: int | None,
    scale: float,
    overlap: float = 1 / 4,
) -> Float[jax.Array, "b _ _ _ _"]:
    """`f` of overlapping tiles of a video, blended; of the whole if that is one tile.

    Where tiles overlap, the weight of the later one rises linearly, first from the tile
    above to the one below it, then from left to right. A wider overlap hides seams
    better.

    Args:
        f: its result has `scale` times as many rows and columns as its argument.
        tile: rows and columns of a tile of `x`; at the right and below they are cut.
            None: the whole video is one tile.
        overlap: fraction of a tile that it shares with the next one, below 1.

    Raises:
        ValueError: tile or overlap are no whole numbers of rows on both sides.

    Source: the original's `tiled_encode` and `tiled_decode`.
    """
    if tile is None:
        return f(x)
    stride, keep, fade = _tiling(tile, scale, overlap)
    height, width = x.shape[2:4]
    if max(height, width) <= tile:
        return f(x)
    bands, above = [], []
    for top in range(0, height, stride):
        row = []
        for left in range(0, width, stride):
            result = f(x[:, :, top : top + tile, left : left + tile])
            if above:
                result = _blend(above[len(row)], result, fade, axis=2)
            if row:
                result = _blend(row[-1], result, fade, axis=3)
            row.append(result)
        band = [result[:, :, :keep, :keep] for result in row]
        bands.append(jnp.concatenate(band, axis=3))
        above = row
    return jnp.concatenate(bands, axis=2)


def tiled_step(
    step: CodecStep, tile: int | None, scale: float, overlap: float = 1 / 4
) -> CodecStep:
    """A step that works on tiles, see `tiled`; its past is that of every tile."""

    def all_tiles(x: Array, past: Any) -> tuple[jax.Array, Any]:
        before, after = iter(past or ()), []

        def one_tile(x: Array) -> jax.Array:
            result, past = step(x, next(before, None))
            after.append(past)
            return result

        return tiled(one_tile, x, tile, scale, overlap), tuple(after)

    return all_tiles


def vae_step(
    network: Callable[..., Any],
    cfg: VAEConfig,
    params: Any,
    mesh: Mesh | AbstractMesh | None,
) -> CodecStep:
    """`vae.encode` or `vae.decode` as a step.

    Args:
        mesh: devices that share every video, see `sharded`; None: one device.
    """
    if mesh is None:
        return lambda x, past: network(cfg, params, x, past)
    factors = (cfg.temporal_factor, cfg.spatial_factor)
    cell = factors if network is vae.encode else (1, 1)
    return sharded(lambda halo: partial(network, cfg, params, halo=halo), mesh, cell)


def sharded(
    make: Callable[[Halo], CodecStep],
    mesh: Mesh | AbstractMesh,
    cell: tuple[int, int] = (1, 1),
) -> CodecStep:
    """A step that all devices of a mesh do together, each with its part of a video.

    Rows of the batch, frames and rows of pixels are divided as `sharding.RULES` says of
    "batch", "frames" and "height"; what cannot be divided evenly is on all devices.
    The beginning of a video, which should be its first frame alone, is on all devices
    of "frames". Pasts are divided by batch and height.

    Args:
        make: the step for a part of a video, with the halo that connects it to others.
        cell: frames and rows that must stay together, e.g. (8, 8) of an encoder.
    """

    def shared(x: Array, past: Any) -> tuple[jax.Array, Any]:
        rows, frames, height = x.shape[:3]
        units = 1 if past is None else frames // cell[0]
        axes = ("batch", "frames", "height")
        where = sharding.place((rows, units, height // cell[1]), axes, mesh).spec
        batch, time, height = (
            entry if sharding.parts(axis, mesh) > 1 else None
            for axis, entry in zip(axes, where, strict=True)
        )
        step = make(Halo(time, height))
        video, pasts = P(batch, time, height), P(batch, None, height)
        specs = (video, pasts)
        divided = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
        return divided(x, past)

    return shared


def _joined(parts: Iterable[jax.Array]) -> jax.Array:
    """One video from its pieces in time."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _tiling(tile: int, scale: float, overlap: float) -> tuple[int, int, int]:
    """The stride of tiles, and the stride and the overlap of results, in rows."""
    step, size = round(tile * (1 - overlap)), round(tile * scale)
    keep = round(size * (1 - overlap))
    exact = math.isclose(tile * (1 - overlap), step) and math.isclose(
        step * scale, keep
    )
    if not 0 <= overlap < 1 or step < 1 or keep < 1 or not exact:
        unit = max(scale, 1 / scale)
        raise ValueError(
            f"tiles of {max(tile, size)} pixels with an overlap of {overlap:g} do not "
            f"begin at multiples of {unit:g} pixels; use a multiple of {4 * unit:g} "
            "pixels and an overlap of 0, 1/4, 1/2 or 3/4"
        )
    return step, keep, size - keep


@partial(jax.jit, static_argnames=("extent", "axis"))
def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, with its first rows faded in over the last ones of `before`."""
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
