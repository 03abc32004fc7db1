# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: products of queries and keys tell distances, nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.models import rotary

DIMS = (16, 24, 24)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def products(q: jax.Array, k: jax.Array, position: jax.Array) -> jax.Array:
    by = rotary.turns(rotary.angles(position, DIMS))
    q, k = rotary.rotate(q, by), rotary.rotate(k, by)
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


def test_products_depend_on_distances_alone():
    q, k = normal(0, 1, 5, 2, 64), normal(1, 1, 5, 2, 64)
    position = 4 * normal(2, 1, 5, 3)
    moved = position + jnp.array([3.0, -2.5, 7.0])[None, None]
    far = products(q, k, moved)
    # float32 angles of up to 15 are known to 1e-6, products are sums of 64.
    np.testing.assert_allclose(products(q, k, position), far, rtol=0, atol=2e-4)


def test_products_do_depend_on_every_axis():
    q, k = normal(0, 1, 2, 1, 64), normal(1, 1, 2, 1, 64)
    here = products(q, k, jnp.zeros((1, 2, 3)))
    for axis in range(3):
        moved = products(q, k, jnp.zeros((1, 2, 3)).at[0, 1, axis].set(1.0))
        assert jnp.abs(moved - here)[0, 0, 0, 1] > 0.1


def test_turning_keeps_the_norm_of_every_pair():
    x, angle = normal(0, 2, 3, 2, 64), 10 * normal(1, 2, 3, 32)
    before, after = (
        jnp.square(y).reshape(2, 3, 2, 32, 2).sum(-1)
        for y in (x, rotary.rotate(x, rotary.turns(angle)))
    )
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_position_zero_changes_nothing():
    x = normal(0, 1, 2, 2, 64)
    angle = rotary.angles(jnp.zeros((1, 2, 3)), DIMS)
    np.testing.assert_array_equal(rotary.rotate(x, rotary.turns(angle)), x)


@pytest.mark.parametrize(
    ("pair", "cos", "sin"),
    [
        (0, -0.98999250, 0.14112000),
        (1, 0.58275360, 0.81264889),
        (8, 0.70866978, -0.70554030),
        (9, -0.83165282, 0.55529594),
        (20, 0.21943997, -0.97562599),
        (31, 0.99999291, 0.00377025),
    ],
)
def test_angles_are_those_of_the_original(pair, cos, sin):
    """A pair (1, 0) turns to (cos, sin)."""
    by = rotary.turns(rotary.angles(jnp.array([[[3.0, 5.5, 17.5]]]), DIMS))
    turned = rotary.rotate(jnp.tile(jnp.array([1.0, 0.0]), 32).reshape(1, 1, 1, 64), by)
    np.testing.assert_allclose(
        turned[0, 0, 0, 2 * pair : 2 * pair + 2], [cos, sin], rtol=0, atol=1e-6
    )


def test_one_axis_turns_by_the_frame_alone():
    position = jnp.array([[[2.0, 5.0, 7.0], [2.0, 0.0, 0.0], [3.0, 5.0, 7.0]]])
    first, second, third = rotary.angles(position, (64,))[0]
    np.testing.assert_array_equal(first, second)
    assert first.shape == (32,) and first[0] == 2.0 and third[0] == 3.0


def test_bfloat16_is_turned_in_float32():
    x = normal(0, 1, 4, 2, 64).astype(jnp.bfloat16)
    by = rotary.turns(30 * normal(1, 1, 4, 32))
    turned, exact = rotary.rotate(x, by), rotary.rotate(x.astype(jnp.float32), by)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))
