# SPDX-License-Identifier: Apache-2.0
"""Attention by blocks against the plain form: what is skipped cannot be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.kernels import attention as entry
from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.attention_blocks import BLOCK, blocks
from pyramid_jax.mask import TokenMask

LENGTH, TEXT = 75, 20  # ten blocks of eight tokens, the last one not full


def packed() -> TokenMask:
    """Texts of three segments, their videos of three frames each, padding; and a row of
    one segment."""
    text = np.repeat([0, 1, 2], [5, 6, 9])
    video = np.repeat([0, 1, 2, -1], [18, 12, 21, LENGTH - TEXT - 51])
    frame = np.concatenate([np.arange(k) * 3 // k for k in (18, 12, 21, 4)])
    first = TokenMask(
        np.concatenate([text, video]), np.concatenate([np.zeros(TEXT, int), frame])
    )
    second = TokenMask(np.zeros(LENGTH, int), np.sort(np.arange(LENGTH) % 4))
    rows = zip(first, second, strict=True)
    return TokenMask(*(jnp.asarray(np.stack(part), jnp.int32) for part in rows))


def inputs(dtype: str = "float32") -> list[jax.Array]:
    """Queries, keys and values; large logits, so that rows differ."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, LENGTH, 3, 8)) for key in keys)
    return [x.astype(dtype) for x in (3 * q, k, v)]


def both(size: int = 8, dtype: str = "float32") -> tuple[list[jax.Array], ...]:
    """Outputs and gradients by blocks, and by the plain form."""
    back = jnp.cos(jnp.arange(2 * LENGTH * 24, dtype=dtype)).reshape(2, LENGTH, 3, 8)

    def all_of(form) -> list[jax.Array]:
        out, pull = jax.vjp(form, *inputs(dtype))
        return [out, *pull(back)]

    mask = packed()
    return (
        all_of(lambda *x: blocks(*x, mask, mask, size)),
        all_of(lambda *x: attention(*x, mask, "xla")),
    )


@pytest.mark.parametrize("size", [8, 25, BLOCK, 128])
def test_values_and_gradients_are_those_of_the_plain_form(size):
    for ours, plain in zip(*both(size), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-5)


def test_bfloat16_is_as_close_as_its_rounding():
    for ours, plain in zip(*both(dtype="bfloat16"), strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, plain = (np.asarray(x, np.float32) for x in (ours, plain))
        np.testing.assert_allclose(ours, plain, rtol=0, atol=0.02 * abs(plain).max())


def test_padding_gets_zeros_and_gives_none():
    padded = np.asarray(packed().segment) < 0
    assert padded.any()
    for values in both()[0]:
        assert jnp.isfinite(values).all()
        np.testing.assert_array_equal(np.asarray(values)[padded], 0.0)


def test_large_logits_do_not_overflow():
    q, k, v = inputs()
    mask = packed()
    value, pull = jax.vjp(lambda *x: blocks(*x, mask, mask, 8), 1e4 * q, 1e4 * k, v)
    assert all(jnp.isfinite(x).all() for x in (value, *pull(jnp.ones_like(value))))


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_transformations_change_nothing(transform):
    mask = packed()

    def energy(q, k, v):
        return jnp.square(blocks(q, k, v, mask, mask, 8)).sum()

    plain = jax.grad(energy, (0, 1, 2))(*inputs())
    changed = jax.grad(transform(energy), (0, 1, 2))(*inputs())
    for a, b in zip(plain, changed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_mapping_over_a_new_axis_equals_a_loop():
    q, k, v = inputs()
    mask, several = packed(), jnp.stack([q, -q])
    mapped = jax.vmap(lambda q: blocks(q, k, v, mask, mask, 8))(several)
    looped = jnp.stack([blocks(q, k, v, mask, mask, 8) for q in several])
    np.testing.assert_allclose(mapped, looped, rtol=0, atol=1e-6)


def test_long_rows_go_through_the_blocks_and_the_log_says_so(monkeypatch, caplog):
    def chosen() -> str:
        caplog.clear()
        with caplog.at_level("INFO", entry.__name__):
            jax.eval_shape(lambda *x: attention(*x, packed()), *inputs())
        return caplog.messages[0].split()[-1]

    assert chosen() == "xla"
    monkeypatch.setattr(entry, "SHORT", LENGTH)
    assert chosen() == "blocks"
