# SPDX-License-Identifier: Apache-2.0
"""Pieces of a video, put together, are the video: with filters instead of a network."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from pyramid_jax import sharding
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.latents import LatentConfig
from pyramid_jax.vae import codec
from pyramid_jax.vae.codec import Codec, Pieces


def video(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@partial(jax.jit, donate_argnums=1)
def doubling(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    """Adds half of the frame before, then doubles all frames but a video's first."""
    before = jnp.zeros_like(x[:, :1]) if past is None else past
    y = x + 0.5 * jnp.concatenate([before, x[:, :-1]], axis=1)
    y = repeat(y, "b f h w c -> b (f two) h w c", two=2)
    return y[:, 1:] if past is None else y, x[:, -1:]


@partial(jax.jit, donate_argnums=1)
def halving(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    """The sum of each second frame, counted from a video's first, with its past one."""
    before = jnp.zeros_like(x[:, :1]) if past is None else past
    return x[:, ::2] + jnp.concatenate([before, x], axis=1)[:, :-1:2], x[:, -1:]


# Later pieces of `halving` begin with the frame whose result is the next.
def halving_later(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
    if past is None:
        return halving(x, past)
    both = jnp.concatenate([past, x], axis=1)
    return x[:, 1::2] + both[:, 1:-1:2], x[:, -1:]


# ----------------------------------------------------------------------------- in time


@pytest.mark.parametrize(("first", "window"), [(1, 1), (1, 3), (3, 2), (1, 10)])
def test_chunks_of_any_length_make_the_whole(first: int, window: int):
    x = video(2, 8, 2, 3, 1)
    whole, _ = doubling(x, None)
    result = codec.chunked(doubling, x, first, window)
    np.testing.assert_allclose(result, whole, rtol=1e-6)


@pytest.mark.parametrize("window", [2, 6])
def test_chunks_of_a_step_that_leaves_out_frames_make_the_whole(window: int):
    x = video(1, 9, 2, 2, 1)
    whole, _ = halving(x, None)
    result = codec.chunked(halving_later, x, 1, window)
    np.testing.assert_allclose(result, whole, rtol=1e-6)


def test_a_video_that_is_one_piece_is_not_filled_up():
    lengths = []

    def step(x: Any, past: Any) -> Any:
        lengths.append(x.shape[1])
        return x, past

    codec.chunked(step, video(1, 2, 1, 1, 1), first=3, window=4)
    codec.chunked(step, video(1, 8, 1, 1, 1), first=3, window=4)
    assert lengths == [2, 3, 4, 4]


def test_a_stream_gives_each_piece_before_it_asks_for_the_next():
    asked = []

    def pieces():
        for i in range(3):
            asked.append(i)
            yield video(1, 8, 2, 2, 1)[:, 2 * i : 2 * i + 2]

    result = []
    for i, part in enumerate(codec.stream(doubling, pieces())):
        assert asked == list(range(i + 1))
        result.append(part)
    whole, _ = doubling(video(1, 8, 2, 2, 1)[:, :6], None)
    np.testing.assert_allclose(jnp.concatenate(result, axis=1), whole, rtol=1e-6)


def test_a_stream_compiles_twice_and_consumes_its_past():
    traces, pasts = [], []

    @partial(jax.jit, donate_argnums=1)
    def step(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        traces.append(x.shape)
        return (x * 2, x) if past is None else (x + past, x + past)

    def noted(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        pasts.append(past)
        return step(x, past)

    for _ in codec.stream(noted, (jnp.ones((1, 1, 4, 4, 1)) * i for i in range(5))):
        pass
    assert len(traces) == 2
    assert all(past.is_deleted() for past in pasts[1:])


# ------------------------------------------------------------------------------ tiles


def enlarge(x: jax.Array, factor: int = 2) -> jax.Array:
    return repeat(jnp.tanh(x), "b f h w c -> b f (h y) (w x) c", y=factor, x=factor)


def shrink(x: jax.Array) -> jax.Array:
    return x[:, :, ::2, ::2] + x[:, :, 1::2, 1::2]


@pytest.mark.parametrize(
    ("tile", "overlap", "height", "width"),
    [(8, 0, 17, 8), (8, 1 / 4, 24, 14), (4, 1 / 2, 3, 10), (8, 3 / 4, 9, 12)],
)
def test_tiles_of_a_local_function_equal_the_whole(tile, overlap, height, width):
    x = video(1, 2, height, width, 3)
    result = codec.tiled(enlarge, x, tile, 2, overlap)
    np.testing.assert_allclose(result, enlarge(x), rtol=1e-5, atol=1e-6)


def test_tiles_of_a_function_that_shrinks_equal_the_whole():
    x = video(1, 1, 40, 24, 2)
    result = codec.tiled(shrink, x, 16, 1 / 2)
    np.testing.assert_allclose(result, shrink(x), rtol=1e-5, atol=1e-6)


def test_the_blend_rises_linearly_from_one_tile_to_the_next():
    """Tiles say 0, 1, 2, ... in the order in which they are made; weights by hand."""
    numbers = iter(range(10))

    def number(x: jax.Array) -> jax.Array:
        return jnp.full(x.shape, float(next(numbers)))

    result = codec.tiled(number, jnp.zeros((1, 1, 1, 7, 1)), 4, 1, 1 / 2)[0, 0, 0, :, 0]
    np.testing.assert_allclose(result, [0, 0, 0, 0.5, 1, 1.5, 2], rtol=1e-6)


def test_a_wider_overlap_makes_smaller_seams():
    """A tile with its own brightness differs from its neighbour by smaller steps."""
    numbers = iter(range(100))

    def number(x: jax.Array) -> jax.Array:
        return jnp.full(x.shape, float(next(numbers) % 2))

    def seam(overlap: float) -> float:
        result = codec.tiled(number, jnp.zeros((1, 1, 8, 64, 1)), 16, 1, overlap)
        return float(jnp.abs(jnp.diff(result[0, 0, 0, :, 0])).max())

    assert seam(1 / 2) < seam(1 / 4) < seam(0)


def test_equal_tiles_compile_once():
    shapes = []

    @jax.jit
    def noted(x: jax.Array) -> jax.Array:
        shapes.append(x.shape[2:4])
        return x

    codec.tiled(noted, video(1, 1, 14, 14, 1), 8, 1)
    codec.tiled(noted, video(1, 1, 20, 20, 1), 8, 1)
    assert sorted(shapes) == [(2, 2), (2, 8), (8, 2), (8, 8)]


def test_a_stream_of_tiles_is_the_whole_video():
    x = video(1, 5, 12, 20, 2)

    def step(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        y, past = doubling(x, past)
        return enlarge(y), past

    tiles = codec.tiled_step(step, 8, 2)
    result = codec.chunked(tiles, x, 1, 2)
    np.testing.assert_allclose(result, step(x, None)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "scale", "overlap"),
    [(36, 1 / 8, 1 / 4), (8, 8, 1 / 3), (8, 8, 1), (8, 8, -0.5)],
)
def test_tiles_that_do_not_fit_together_are_refused(tile, scale, overlap):
    with pytest.raises(
        ValueError, match="begin at multiples of 8 pixels; use a multiple of 32"
    ):
        codec.tiled(jnp.tanh, video(1, 1, 4, 4, 1), tile, scale, overlap)


# --------------------------------------------------------------------- many devices


def neighbours(strength: Any, halo: Halo) -> codec.CodecStep:
    """Each cell with those of its frame and the two before, above and below it."""

    def step(x: jax.Array, past: Any) -> tuple[jax.Array, Any]:
        x, past = halo.frames(x, past, 3, 1)
        y = x[:, 2:] + strength * (x[:, 1:-1] - 2 * x[:, :-2])
        around = ((0, 0), (0, 0), halo.padding, (0, 0), (0, 0))
        y = jnp.pad(halo.rows(y), around)
        y = y[:, :, 1:-1] + strength * (y[:, :, 2:] - 3 * y[:, :, :-2])
        return y * halo.mean((y**2).mean(axis=2, keepdims=True)), past

    return step


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "context": 2, "tensor": 2}, {"data": 1, "context": 8}],
    ids=lambda sizes: "-".join(sizes),
)
def test_many_devices_compute_what_one_computes(sizes):
    mesh, x = sharding.device_mesh(**sizes), video(2, 9, 8, 2, 1)

    def run(step: codec.CodecStep, x: jax.Array) -> jax.Array:
        first, past = step(x[:, :1], None)
        return jnp.concatenate([first, step(x[:, 1:], past)[0]], axis=1)

    def on_one(strength: jax.Array, x: jax.Array) -> jax.Array:
        return run(neighbours(strength, Halo()), x)

    def on_many(strength: jax.Array, x: jax.Array) -> jax.Array:
        return run(codec.sharded(partial(neighbours, strength), mesh), x)

    results = []
    for f in (on_one, on_many):
        result, pull = jax.vjp(jax.jit(f), jnp.float32(0.3), x)
        results.append((result, pull(jnp.sin(result))))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *results)


def test_what_can_not_be_divided_is_on_all_devices():
    mesh, x = sharding.device_mesh(data=1, context=4, tensor=2), video(1, 3, 5, 2, 1)
    seen = []

    def make(halo: Halo) -> codec.CodecStep:
        seen.append(halo)
        return neighbours(0.5, halo)

    step = codec.sharded(make, mesh)
    _, past = step(x[:, :1], None)
    result, _ = step(x[:, 1:], past)
    assert seen == [Halo(), Halo()]
    np.testing.assert_allclose(result, neighbours(0.5, Halo())(x, None)[0][:, 1:], 1e-5)


# ---------------------------------------------------------------------------- a codec

LATENT = LatentConfig(2, 2, 2, 0.5, 2.0, -1.0, 0.25)


def spatial(step: codec.CodecStep, change: Any) -> codec.CodecStep:
    """A step that also changes rows and columns."""

    def run(x: Any, past: Any) -> Any:
        y, past = step(x, past)
        return change(y), past

    return run


@jax.jit
def posterior(moments: jax.Array, noise: jax.Array | None) -> jax.Array:
    mean, deviation = moments[..., :2], moments[..., 1:] ** 2
    return mean if noise is None else mean + deviation * noise


def coloured(x: jax.Array) -> jax.Array:
    return enlarge(jnp.concatenate([x, x[..., :1]], axis=-1))


CODEC = Codec(
    LATENT, spatial(halving_later, shrink), posterior, spatial(doubling, coloured)
)


def test_pieces_change_neither_latents_nor_pixels():
    x = video(1, 9, 16, 24, 3)
    z = CODEC.encode(x)
    assert z.shape == (1, 5, 8, 12, 2)
    y = CODEC.decode(z)
    for pieces in (Pieces(frames=2), Pieces(frames=4), Pieces(tile=8, overlap=1 / 2)):
        np.testing.assert_allclose(CODEC.encode(x, pieces=pieces), z, 1e-5, 1e-5)
        np.testing.assert_allclose(CODEC.decode(z, pieces), y, 1e-5, 1e-5)


def test_latents_have_the_statistics_of_images_at_the_start_and_of_videos_later():
    x = video(1, 5, 4, 4, 3)
    raw = posterior(CODEC.encoder(x, None)[0], None)
    z = CODEC.encode(x)
    np.testing.assert_allclose(z[:, :1], (raw[:, :1] - 0.5) * 2, rtol=1e-5)
    np.testing.assert_allclose(z[:, 1:], (raw[:, 1:] + 1) * 0.25, rtol=1e-5)


def test_noise_draws_latents_from_the_posterior():
    x, noise = video(1, 3, 4, 4, 3), jnp.ones((1, 2, 2, 2, 2))
    moments = CODEC.encoder(x, None)[0]
    drawn = CODEC.encode(x, noise) - CODEC.encode(x)
    scale = jnp.array([2.0, 0.25]).reshape(1, 2, 1, 1, 1)
    np.testing.assert_allclose(drawn, moments[..., 1:] ** 2 * scale, 1e-4, 1e-4)


@pytest.mark.parametrize("pieces", [Pieces(), Pieces(tile=8)])
def test_a_stream_of_latents_is_the_decoded_video(pieces: Pieces):
    z = video(1, 4, 6, 6, 2)
    parts = CODEC.stream((z[:, :1], z[:, 1:3], z[:, 3:]), pieces)
    result = jnp.concatenate(list(parts), axis=1)
    np.testing.assert_allclose(result, CODEC.decode(z), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("frames", "pieces", "message"),
    [
        (4, Pieces(), r"4 frames are not 1 \+ a multiple of 2; use 3 or 5"),
        (5, Pieces(frames=3), "pieces of frames 3 are not a multiple of 2; use 2"),
        (5, Pieces(tile=0), "pieces of tile 0 are not a multiple of 2; use 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_advice(frames, pieces, message):
    with pytest.raises(ValueError, match=message):
        CODEC.encode(video(1, frames, 4, 4, 3), pieces=pieces)
