# SPDX-License-Identifier: Apache-2.0
"""Attention against its formula in float64 numpy, and what padding may never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.kernels.attention import BACKENDS, attention
from pyramid_jax.mask import TokenMask, dense_mask

# Two packed segments with padding at the end, and a whole row of one segment.
MASK = TokenMask(
    jnp.array([[0, 1, 0, 0, 1, 1, 1, -1, -1], [0] * 9]),
    jnp.array([[0, 0, 0, 1, 0, 1, 2, -1, 3], [0, 0, 1, 1, 2, 2, 3, 3, 3]]),
)
PADDED = np.array([7, 8])


def inputs(dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """Queries, keys and values of `MASK`'s size; large logits, so that rows differ."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 9, 3, 8)) for key in keys)
    return tuple(x.astype(dtype) for x in (3 * q, k, v))


def by_the_formula(q, k, v, mask: TokenMask) -> np.ndarray:
    """softmax(q kᵀ / sqrt(dim)) v in float64, query by query over its visible keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    sees = np.asarray(dense_mask(mask))
    for b, query in np.ndindex(*sees.shape[:2]):
        visible = sees[b, query]
        if not visible.any():
            continue
        logits = (
            np.einsum("hd,khd->kh", q[b, query], k[b, visible]) / q.shape[-1] ** 0.5
        )
        weights = np.exp(logits - logits.max(0))
        weights /= weights.sum(0)
        out[b, query] = np.einsum("kh,khd->hd", weights, v[b, visible])
    return out


def loss(q, k, v, mask: TokenMask) -> jax.Array:
    """A number that depends on every output."""
    out = attention(q, k, v, mask)
    return (
        out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    ).sum()


@pytest.mark.parametrize("backend", [None, "xla"])
def test_attention_is_the_softmax_over_visible_keys(backend):
    out = attention(*inputs(), MASK, backend)
    np.testing.assert_allclose(out, by_the_formula(*inputs(), MASK), rtol=0, atol=2e-6)


def test_bfloat16_is_as_close_as_its_rounding():
    """Weights and outputs are rounded to 8 bits, values are up to 3."""
    q, k, v = inputs(jnp.bfloat16)
    out = attention(q, k, v, MASK)
    assert out.dtype == jnp.bfloat16
    exact = by_the_formula(*(x.astype(jnp.float32) for x in (q, k, v)), MASK)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0, atol=0.05)


def test_a_query_without_visible_keys_gets_zeros():
    out = attention(*inputs(), MASK)
    np.testing.assert_array_equal(out[0, PADDED], 0.0)
    assert jnp.abs(out[0, :7]).min() > 0


def test_padding_gets_and_gives_no_gradient():
    gradients = jax.grad(loss, (0, 1, 2))(*inputs(), MASK)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0, PADDED], 0.0)
        assert (jnp.abs(gradient[1]).max(axis=(1, 2)) > 0).all()


def test_gradients_are_those_of_the_formula():
    """Central differences of the float64 formula along a random direction."""
    args = inputs()
    along = np.random.default_rng(0).normal(size=(3, *args[0].shape))
    gradients = jax.grad(loss, (0, 1, 2))(*args, MASK)
    slope = np.vdot(gradients, along)

    def at(step: float) -> float:
        moved = [np.float64(x) + step * d for x, d in zip(args, along, strict=True)]
        out = by_the_formula(*moved, MASK)
        weight = np.cos(np.arange(out.size, dtype=np.float64)).reshape(out.shape)
        return (out * weight).sum()

    assert slope == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-4)


def test_large_logits_do_not_overflow():
    q, k, v = inputs()
    out = attention(1e4 * q, 1e4 * k, v, MASK)
    assert jnp.isfinite(out).all()
    # Softmax has become a choice: every output is one of the values.
    distance = jnp.abs(out[1][:, None] - v[1][None]).max(axis=-1).min(axis=1)
    np.testing.assert_allclose(distance, 0.0, atol=1e-6)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_transformations_change_nothing(transform):
    plain = jax.value_and_grad(loss)(*inputs(), MASK)
    transformed = jax.value_and_grad(transform(loss))(*inputs(), MASK)
    for a, b in zip(plain, transformed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_mapping_over_a_new_axis_equals_a_loop():
    q, k, v = inputs()
    several = jnp.stack([q, -q, 2 * q])
    mapped = jax.vmap(lambda q: attention(q, k, v, MASK))(several)
    looped = jnp.stack([attention(q, k, v, MASK) for q in several])
    np.testing.assert_allclose(mapped, looped, rtol=0, atol=1e-6)


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'") as error:
        attention(*inputs(), MASK, "cuda")
    assert str(BACKENDS) in str(error.value)
