# SPDX-License-Identifier: Apache-2.0
"""Attention by other libraries: the same values and gradients, or a reason why not."""

import functools
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention as benchmark
from benchmarks import attention_libraries as libraries
from benchmarks.attention_libraries import cudnn, splash, tokamax
from benchmarks.attention_rivals import rival
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
    """What cuDNN computes, for a CPU."""
    assert implementation == "cudnn"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def with_tokamax(monkeypatch, kernel) -> None:
    """Puts a kernel into a tokamax of nothing else."""
    kernels = SimpleNamespace(IMPLEMENTATIONS={"xla": kernel})
    monkeypatch.setitem(sys.modules, f"{libraries.TOKAMAX}.api", kernels)
    base = SimpleNamespace(Mask=SimpleNamespace)
    monkeypatch.setitem(sys.modules, f"{libraries.TOKAMAX}.base", base)


@pytest.mark.parametrize("name", ["384p stage 2 unit 8", "packed 16384", "scattered"])
def test_tokamax_is_given_the_interval_of_keys_of_every_query(name, monkeypatch):
    """In rows that are put in order, and back, it sees what the formula sees."""

    def kernel(q, k, v, mask):
        key, lengths = jnp.arange(k.shape[1], dtype=jnp.int32), mask.k_end.shape
        assert lengths == (q.shape[0], 1, q.shape[1]) and q.shape[1] % 8 == 0
        start, end = (x[..., None] for x in (mask.k_start, mask.k_end))
        sees = (start <= key[None, None, None]) & (key[None, None, None] < end)
        return jax.nn.dot_product_attention(q, k, v, mask=sees, implementation="xla")

    with_tokamax(monkeypatch, kernel)
    given = benchmark.problem(replace(benchmark.REDUCED, rows=2), name, 2)
    one = rival("tokamax", given)
    assert max(benchmark.errors(given, one).values()) < 1e-5
    out = one.take(one.forward(*map(one.put, given[:3])))
    np.testing.assert_array_equal(out[given.mask.segment < 0], 0.0)


def test_kernels_of_tokamax_that_refuse_are_named(monkeypatch):
    def refuses(*_, mask):
        raise NotImplementedError("only on Thursdays")

    with_tokamax(monkeypatch, refuses)
    keys = libraries.intervals(MASK)
    with pytest.raises(ValueError, match=r"no kernel on cpu.*xla: only on Thursdays"):
        tokamax(*inputs()[:3], keys)


def test_a_tokamax_that_its_typeguard_breaks_is_told_apart(monkeypatch):
    """As on an H200 with Python 3.12: tokamax 0.0.12 beside typeguard 4."""

    def broken(_):
        compile("*B T H D", "<unknown>", "eval")

    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(ValueError, match=r"install tokamax 0.0.17 .* or typeguard 2"):
        tokamax(*inputs()[:3], libraries.intervals(MASK))


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
        (cudnn, "needs an NVIDIA GPU with cuDNN, .* given are float32, .* on cpu"),
        (splash, "needs jax.experimental.pallas.*, which jax .* does not have"),
        (tokamax, "needs the package tokamax"),
    ],
    ids=["cudnn", "splash", "tokamax"],
)
def test_what_is_missing_is_named(library, reason, monkeypatch):
    for module in (f"{libraries.TOKAMAX}.api", libraries.SPLASH):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=reason):
        library(*inputs()[:3], MASK)
