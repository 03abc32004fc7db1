# SPDX-License-Identifier: Apache-2.0
"""The kernel that norms, rotates and joins queries and keys computes its plain form."""

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.kernels import joining as module
from pyramid_jax.kernels.joining import (
    Projection,
    joined,
    joined_triton,
    sent_by_heads,
    trial_shapes,
)
from pyramid_jax.kernels.trial import difference
from pyramid_jax.models.dit_blocks import query_key_value

EPS, KERNEL = 1e-5, "pallas_triton"


@pytest.fixture(autouse=True)
def untried():
    """No verdict of one test is another's."""
    module._works.cache_clear()
    yield
    module._works.cache_clear()


def inputs(lengths: tuple[int, ...], rows: int = 1, heads: int = 2, dim: int = 16):
    """Random projections of streams so long, and turns of all their tokens."""
    draw = np.random.default_rng(1)

    def some(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    streams = [
        Projection(
            some(rows, n, 3, heads, dim), some(3, heads, dim), some(dim), some(dim)
        )
        for n in lengths
    ]
    angle = some(rows, sum(lengths), dim // 2)
    return streams, (jnp.cos(angle), jnp.sin(angle))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [16, 64])
def test_values_and_gradients_are_those_of_the_plain_form(dim, dtype):
    kernel = partial(joined, query_key_value, EPS, backend=KERNEL)
    plain = partial(query_key_value, eps=EPS)
    assert difference(kernel, plain, trial_shapes(dim, dtype)) is None


@pytest.mark.parametrize("lengths", [(64, 64), (70,), (1, 130), (0, 65)])
def test_streams_of_any_length_are_joined(lengths):
    streams, turns = inputs(lengths)
    found = joined(query_key_value, EPS, streams, turns, KERNEL)
    expected = query_key_value(streams, turns, EPS)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_mesh_divides_rows_and_heads():
    streams, turns = inputs((9, 70), rows=4, heads=4)

    def loss(backend: str, streams: list[Projection]) -> jax.Array:
        out = joined(query_key_value, EPS, streams, turns, backend)
        return jnp.stack([(i + 1) * jnp.sum(x**3) for i, x in enumerate(out)]).sum()

    expected = jax.value_and_grad(partial(loss, "xla"))(streams)
    with jax.set_mesh(sharding.device_mesh(data=2, tensor=2, context=2)):
        found = jax.jit(jax.value_and_grad(partial(loss, KERNEL)))(streams)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("backend", ["xla", KERNEL])
@pytest.mark.parametrize("groups", [1, 2])
def test_devices_that_share_tokens_send_each_other_heads(backend, groups):
    """Group g has the heads g, g + groups, ... of those that a device gets."""
    (stream,), turns = inputs((36,), rows=2, heads=16)

    def loss(sent: bool, stream: Projection) -> Any:
        if sent:
            how = query_key_value, EPS, stream, turns, backend, groups
            parts = sent_by_heads(*how)
        else:
            whole = joined(query_key_value, EPS, [stream], turns, "xla")
            split = [x.reshape(2, 36, 4, groups, 4 // groups, 16) for x in whole]
            parts = [
                [x[:, :, :, g].reshape(2, 36, -1, 16) for x in split]
                for g in range(groups)
            ]
        powers = [(i + 1) * jnp.sum(x**3) for i, x in enumerate(jax.tree.leaves(parts))]
        return jnp.stack(powers).sum(), parts

    both_ways = partial(jax.value_and_grad, has_aux=True)
    expected = both_ways(partial(loss, False))(stream)
    with jax.set_mesh(sharding.device_mesh(data=2, tensor=2, context=2)):
        found = jax.jit(both_ways(partial(loss, True)))(stream)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("backend", "dim"), [("blocks", 16), (KERNEL, 24)])
def test_other_backends_and_widths_take_the_plain_form(backend, dim, monkeypatch):
    monkeypatch.setattr(module, "joined_triton", None)
    found = joined(query_key_value, EPS, *inputs((5, 6), dim=dim), backend)
    assert found[0].shape == (1, 11, 2, dim)


def test_a_kernel_that_fails_its_trial_is_left_out(monkeypatch, caplog):
    def wrong(*arguments):
        made = joined_triton(*arguments)
        return made[0], -made[1], made[2]

    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(module, "joined_triton", wrong)
    streams, turns = inputs((5, 6))
    with caplog.at_level(logging.WARNING):
        found = joined(query_key_value, EPS, streams, turns, KERNEL)
    assert "failed its trial" in caplog.text
    expected = query_key_value(streams, turns, EPS)
    np.testing.assert_array_equal(found[1], expected[1])
