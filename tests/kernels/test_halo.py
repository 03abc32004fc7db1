# SPDX-License-Identifier: Apache-2.0
"""Devices that share a video compute what one device computes, and its gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pyramid_jax.kernels.halo import Halo
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.sharding import unbox

# Compiling is most of the time that these tests take.
CFG = VAEConfig(
    latent=2,
    encoder_widths=(4,),
    decoder_widths=(4,),
    encoder_layers=(1,),
    decoder_layers=(1,),
    spatial=(True,),
    temporal=(True,),
    groups=2,
)
HALOS = {
    "time": ((4, 1), Halo(time="t")),
    "height": ((1, 4), Halo(height="h")),
    "both": ((2, 2), Halo("t", "h")),
}


def grid(sizes: tuple[int, int]) -> jax.sharding.Mesh:
    """A mesh with axes t and h over as many devices as it needs."""
    devices = np.asarray(jax.devices()[: sizes[0] * sizes[1]])
    return jax.sharding.Mesh(devices.reshape(sizes), ("t", "h"))


def divided(f: Any, sizes: tuple[int, int], halo: Halo, outputs: Any) -> Any:
    """`f` of a local video, compiled for all devices of a mesh."""
    run = jax.shard_map(
        f, mesh=grid(sizes), in_specs=P(None, halo.time, halo.height), out_specs=outputs
    )
    return jax.jit(run)


def video(frames: int, rows: int = 2) -> jax.Array:
    """Every value another one."""
    shape = (1, frames, rows, 1, 1)
    return 1.0 + jnp.arange(frames * rows, dtype=jnp.float32).reshape(shape)


# ----------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_frames_before_come_from_as_many_devices_as_have_them(frames, stride):
    whole = video(3 - stride + 4 * frames)
    past, x = whole[:, : 3 - stride], whole[:, 3 - stride :]
    halo = Halo(time="t")

    def local(x):
        return halo.frames(x, past, 3, stride)

    seen, after = divided(local, (4, 1), halo, (P(None, "t"), P()))(x)
    parts = np.split(np.asarray(seen), 4, axis=1)
    for i, part in enumerate(parts):
        begin = i * frames
        np.testing.assert_array_equal(part, whole[:, begin : begin + part.shape[1]])
    np.testing.assert_array_equal(after, whole[:, -(3 - stride) :])


def test_a_video_begins_alike_on_all_devices():
    halo = Halo(time="t")

    def local(x):
        return halo.frames(x, None, 3, 1)

    run = jax.shard_map(local, mesh=grid((4, 1)), in_specs=P(), out_specs=P())
    seen, after = jax.jit(run)(video(1))
    np.testing.assert_array_equal(seen[:, :2], np.zeros((1, 2, 2, 1, 1)))
    np.testing.assert_array_equal(seen[:, 2:], video(1))
    np.testing.assert_array_equal(after, seen[:, -2:])


def test_rows_come_from_both_neighbours_and_are_zero_outside():
    halo = Halo(height="h")
    rows = divided(halo.rows, (1, 4), halo, P(None, None, "h"))(video(1, rows=8))
    expected = [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 0]
    np.testing.assert_array_equal(rows.ravel(), expected)


def test_without_axes_nothing_is_added_but_zeros_in_front():
    seen, after = Halo().frames(video(2), None, 3, 2)
    np.testing.assert_array_equal(seen[:, :2], np.zeros((1, 2, 2, 1, 1)))
    np.testing.assert_array_equal(seen[:, 2:], video(2))
    np.testing.assert_array_equal(after, video(2)[:, -1:])
    assert Halo().rows(video(2)).shape == video(2).shape
    assert (Halo().padding, Halo(height="h").padding) == ((1, 1), (0, 0))


# ----------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def weights() -> Any:
    """Weights large enough that every one of them matters."""
    like = unbox(jax.eval_shape(partial(vae.initialise_vae, CFG), jax.random.key(0)))
    source = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * source.standard_normal(x.shape, np.float32)), like
    )


def pixels() -> jax.Array:
    """The first frame and eight more, which four devices divide."""
    return jax.random.normal(jax.random.key(2), (1, 9, 16, 4, 3))


def coded(params: Any, x: jax.Array, run: Any) -> tuple[jax.Array, jax.Array]:
    """Raw moments and decoded pixels, the first frame alone and the rest with its past.

    Args:
        run: calls `encode` or `decode` on all devices.
    """

    def whole(f: Any, x: jax.Array) -> jax.Array:
        first, past = run(f, params, x[:, :1], None)
        rest, _ = run(f, params, x[:, 1:], past)
        return jnp.concatenate([first, rest], axis=1)

    raw = whole(vae.encode, x)
    return raw, whole(vae.decode, vae.moments(raw).mean)


def on_one(f: Any, params: Any, x: jax.Array, past: Any) -> Any:
    return f(CFG, params, x, past)


def on_many(
    sizes: Any, halo: Halo, f: Any, params: Any, x: jax.Array, past: Any
) -> Any:
    """The same on a mesh."""
    time = None if past is None else halo.time
    parts, kept = P(None, time, halo.height), P(None, None, halo.height)
    local = partial(f, CFG, halo=halo)
    run = partial(jax.shard_map, mesh=grid(sizes), out_specs=(parts, kept))
    if past is None:
        return run(local, in_specs=(P(), parts))(params, x)
    return run(local, in_specs=(P(), parts, kept))(params, x, past)


def results(run: Any, params: Any) -> Any:
    """Values, and gradients of a function of them by weights and pixels."""

    def loss(params: Any, x: jax.Array) -> Any:
        raw, decoded = coded(params, x, run)
        return jnp.sin(raw).sum() + jnp.cos(decoded).sum(), (raw, decoded)

    value = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.device_get(jax.jit(value)(params, pixels()))


@pytest.fixture(scope="module")
def on_one_device(weights) -> Any:
    return results(on_one, weights)


@pytest.mark.parametrize(
    "name",
    [
        "both",
        pytest.param("time", marks=pytest.mark.slow),
        pytest.param("height", marks=pytest.mark.slow),
    ],
)
def test_many_devices_encode_and_decode_what_one_does(name, weights, on_one_device):
    (_, values), gradients = results(partial(on_many, *HALOS[name]), weights)
    (_, one_values), one_gradients = on_one_device
    for many, one in zip(values, one_values, strict=True):
        np.testing.assert_allclose(many, one, atol=1e-4 * np.abs(one).max())
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, many), one in zip(leaves, jax.tree.leaves(one_gradients), strict=True):
        largest = np.abs(one).max()
        # A bias before a norm, or of keys, changes nothing: rounding alone.
        np.testing.assert_allclose(
            many, one, atol=1e-3 * largest + 1e-4, err_msg=jax.tree_util.keystr(path)
        )
