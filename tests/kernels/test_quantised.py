# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.kernels.quantised import QUANTISED, rounded_product

LAST = (((1,), (0,)), ((), ()))  # of x with the first axis of w
DEEP = (((2,), (0,)), ((), ()))


def pair(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    shapes = (x_shape, w_shape)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def error(actual: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(
    ("x", "w", "dimensions"),
    [
        ((5, 64), (64, 3), LAST),
        ((2, 5, 64), (64, 3, 4), DEEP),
        ((2, 5, 4, 16), (4, 16, 7), (((2, 3), (0, 1)), ((), ()))),
    ],
)
def test_products_are_as_close_as_eight_bits_are(kind, x, w, dimensions):
    x, w = pair(x, w)
    sizes = jnp.linspace(0.01, 100, w.shape[-1])  # of columns
    w = w * sizes.reshape((1,) * (w.ndim - 1) + sizes.shape)
    actual, expected = (
        dot(x, w, dimensions) for dot in (rounded_product(kind), jax.lax.dot_general)
    )
    assert actual.dtype == x.dtype
    assert error(actual, expected) < {"int8": 0.015, "fp8": 0.05}[kind]


def test_integers_are_multiplied_exactly():
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, s).astype(np.float32) for s in ((6, 32), (32, 5)))
    x[:, 0], w[0] = 127, -127  # so that every scale is one
    actual = rounded_product("int8")(jnp.asarray(x), jnp.asarray(w), LAST)
    np.testing.assert_array_equal(actual, x @ w)


@pytest.mark.parametrize("kind", QUANTISED)
def test_zeros_stay_zeros(kind):
    zeros = rounded_product(kind)(jnp.zeros((2, 8)), jnp.ones((8, 3)), LAST)
    np.testing.assert_array_equal(zeros, jnp.zeros((2, 3)))


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_may_be_none_at_all(kind):
    """As text whose keys and values are remembered."""
    none = rounded_product(kind)(jnp.zeros((2, 0, 8)), jnp.ones((8, 3)), DEEP)
    assert none.shape == (2, 0, 3)


@pytest.mark.parametrize("kind", QUANTISED)
def test_gradients_are_those_of_the_exact_product(kind):
    x, w = pair((5, 8), (8, 3))
    slopes = [
        jax.grad(lambda x, w, dot=dot: dot(x, w, LAST).sum(), argnums=(0, 1))(x, w)
        for dot in (rounded_product(kind), jax.lax.dot_general)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *slopes)


def test_exact_products_are_the_librarys():
    assert rounded_product("exact") is None
    with pytest.raises(ValueError, match="'int4' must be one of"):
        rounded_product("int4")
