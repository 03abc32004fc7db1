# SPDX-License-Identifier: Apache-2.0
"""Attention by other libraries: the same values and gradients, or a reason why not."""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_libraries as libraries
from benchmarks.attention_libraries import LIBRARIES, cudnn, splash, tokamax
from launch.compile.cases import batch
from pyramid_jax.kernels.attention import attention
from pyramid_jax.mask import TokenMask

LENGTH, HEADS, DIM = 141, 2, 16  # two blocks of 128 tokens, the last one not full


def inputs(dtype: str = "float32") -> list[jax.Array]:
    """Queries, keys, values and what comes back; large logits, so that rows differ."""
    draw = np.random.default_rng(0)
    shape = (2, LENGTH, HEADS, DIM)
    q, *rest = (draw.standard_normal(shape, np.float32) for _ in range(4))
    return [jnp.asarray(x, dtype) for x in (2 * q, *rest)]


MASK = TokenMask(*map(jnp.asarray, batch(["packed", "scattered"], LENGTH, 1 / 16)))


def both_ways(form, q, k, v, back) -> list[jax.Array]:
    """The output of `form(q, k, v)` and the gradients of q, k and v."""
    out, pull = jax.vjp(form, q, k, v)
    return [out, *pull(back)]


def assert_like_the_plain_form(form) -> None:
    """Values and gradients, to the rounding of float32 sums; zeros for padding."""
    exact = functools.partial(both_ways, lambda *x: attention(*x, MASK, "xla"))
    plain = jax.jit(exact)(*inputs())
    found = jax.jit(functools.partial(both_ways, form))(*inputs())
    padded = np.asarray(MASK.segment) < 0
    assert padded.any()
    for ours, exact in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(ours)[padded], 0.0)


def test_splash_attention_computes_the_plain_form(monkeypatch):
    """Interpreted, in blocks of 128 tokens."""
    monkeypatch.setattr(libraries, "BLOCK", 128)
    assert_like_the_plain_form(lambda *x: splash(*x, MASK, interpret=True))


def plain_product(q, k, v, mask, implementation):
    """What the attention of the libraries computes, for a CPU."""
    assert implementation in ("cudnn", ("xla",))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def test_tokamax_is_given_the_mask(monkeypatch):
    library = SimpleNamespace(dot_product_attention=plain_product)
    monkeypatch.setitem(sys.modules, "tokamax", library)
    assert_like_the_plain_form(lambda *x: tokamax(*x, MASK))


def test_cudnn_is_given_the_mask_and_an_even_number_of_tokens(monkeypatch):
    """Rounded to bfloat16, which is all that cuDNN takes."""
    lengths = []

    arrays = inputs("bfloat16")[:3]

    def product(q, k, v, **given):
        lengths.append(q.shape[1])
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        return plain_product(*wide, **given).astype(q.dtype)

    plain = jax.jit(lambda *x: attention(*x, MASK, "xla"))(*arrays)
    monkeypatch.setattr(libraries.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(libraries, "product_of_cudnn", product)
    found = jax.jit(lambda *x: cudnn(*x, MASK))(*arrays)
    assert lengths == [LENGTH + 3]
    assert found.dtype == jnp.bfloat16
    found, plain = (np.asarray(x, np.float32) for x in (found, plain))
    np.testing.assert_allclose(found, plain, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        ("cudnn", "needs an NVIDIA GPU with cuDNN, .* given are float32, .* on cpu"),
        ("splash", "needs jax.experimental.pallas.*, which jax .* does not have"),
        ("tokamax", "needs the package tokamax"),
    ],
)
def test_what_is_missing_is_named(library, reason, monkeypatch):
    for module in ("tokamax", libraries.SPLASH):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=reason):
        LIBRARIES[library](*inputs()[:3], MASK)
