# SPDX-License-Identifier: Apache-2.0
"""Attention for Hopper, interpreted with its memory, barriers and races.

A race, or a barrier that nobody waits for, is an error of the interpreter, which newer
versions of JAX have. Blocks are as small as wgmma allows.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.compile.cases import batch, case_names
from pyramid_jax.kernels import attention_mosaic as module
from pyramid_jax.kernels.attention import attention, attention_plan
from pyramid_jax.kernels.attention_mosaic import attention_mosaic, hopper_lists
from pyramid_jax.kernels.mosaic_kernels import exp2
from pyramid_jax.kernels.tiles import Tiles
from pyramid_jax.mask import TokenMask
from tests.kernels.test_attention_cases import (
    assert_close,
    both_ways,
    by_the_formula,
    on_this_device,
)

SCALE, LENGTH, DIM = 1 / 8, 200, 64
SMALL = Tiles.of(((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)))
SHARE = 0.01  # of the largest value: weights of bfloat16 have 8 bits
ONE = jnp.zeros((1, 256), jnp.int32)  # a segment of one frame

interpreted = pytest.mark.skipif(
    module.INTERPRETER is None, reason="needs JAX 0.11.2 and Python 3.12"
)


def arrays(mask: TokenMask, heads: int = 1, dim: int = DIM, dtype: str = "bfloat16"):
    """Queries, keys, values and what comes back; large logits, so that rows differ."""
    draw = np.random.default_rng(0)
    shape = (*mask.segment.shape, heads, dim)
    q, *others = (draw.standard_normal(shape, np.float32) for _ in range(4))
    return [jnp.asarray(x, dtype) for x in (2 * q, *others)]


def rows(*names: str) -> TokenMask:
    return TokenMask(*map(jnp.asarray, batch(names, LENGTH, SCALE)))


def interpret(q, k, v, query, key, cut=0):
    """Attention with a mask for each side, looking for races."""
    how = module.INTERPRETER(detect_races=True)
    lists = hopper_lists(query, key, SMALL)
    out = attention_mosaic(q, k, v, lists, SMALL, cut=cut, interpret=how)
    return jnp.concatenate(out, axis=1)


def agrees(mask: TokenMask, last: int, cut: int = 0, **sizes) -> None:
    """Values and gradients for the last queries are those of the formula."""
    (q, k, v, back), few = arrays(mask, **sizes), mask.last(last)
    form = partial(both_ways, lambda q, k, v, few: interpret(q, k, v, few, mask, cut))
    found = jax.jit(form)(q[:, -last:], k, v, back[:, -last:], few)
    alone = back.at[:, :-last].set(0.0)
    out, dq, *others = by_the_formula(q, k, v, alone, mask)
    assert_close(found, [out[:, -last:], dq[:, -last:], *others], SHARE)
    for values, side in zip(found, (few, few, mask, mask), strict=True):
        padded = np.asarray(side.segment) < 0
        np.testing.assert_array_equal(np.asarray(values)[padded], 0.0)


@interpreted
def test_values_and_gradients_are_those_of_the_formula():
    """In a packed row with padding; fewer queries than keys, which fill no block; the
    kernel writes the first 64 results apart."""
    agrees(rows("packed tightly"), 75, cut=64)


@interpreted
def test_every_case_agrees():
    """Cut inside a block, which is done after the kernel."""
    agrees(rows(*case_names()), LENGTH, cut=40)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype"), [(32, "bfloat16"), (96, "float16"), (128, "bfloat16")]
)
def test_heads_of_other_widths_and_types_agree(dim, dtype):
    agrees(rows("packed"), LENGTH, heads=2, dim=dim, dtype=dtype)


@cache
def forward(tiles=SMALL):
    """Attention with given lists, in one program for rows of one shape."""
    how = module.INTERPRETER(detect_races=True)
    return jax.jit(lambda *x: attention_mosaic(*x, tiles, interpret=how)[0])


@interpreted
def test_blocks_that_nobody_sees_are_not_loaded():
    padding = TokenMask(ONE.at[:, 128:].set(-1), ONE)
    q, k, v, _ = arrays(padding)
    lists = hopper_lists(padding, padding, SMALL)
    expected = forward()(q, k, v, lists)
    k, v = (x.at[:, 128:].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(forward()(q, k, v, lists), expected)
    np.testing.assert_array_equal(expected[:, 128:], 0.0)


@interpreted
def test_in_blocks_wholly_visible_no_rank_is_compared():
    """So ranks that hide everything change nothing there."""
    q, k, v, _ = arrays(TokenMask(ONE, ONE))
    lists = hopper_lists((ONE, ONE), (ONE, ONE), SMALL)
    hiding = lists._replace(key=jax.tree.map(lambda x: x - 1, lists.key))
    found = forward()(q, k, v, hiding)
    np.testing.assert_array_equal(found, forward()(q, k, v, lists))
    assert jnp.abs(found).min() > 0


def test_a_polynomial_stands_in_for_exponentials():
    """Of every number that softmax has; what is smaller becomes 2^-125."""
    powers = np.linspace(-150, 0, 4096, dtype=np.float32)
    pair = np.stack([powers] * 2, axis=1)
    found, exact = np.asarray(jax.jit(exp2, static_argnums=1)(pair, 1)).T
    expected = np.exp2(np.maximum(powers, -125).astype(np.float64))
    assert abs(found / expected - 1).max() < 7.6e-5
    np.testing.assert_allclose(exact, np.exp2(powers), rtol=1e-5, atol=2e-38)


@interpreted
def test_attention_by_a_polynomial_agrees():
    """For half of the keys, of which all queries see all."""
    mask = TokenMask(ONE, ONE)
    tiles = Tiles(SMALL.forward._replace(polynomial=32), *SMALL[1:])
    q, k, v, back = arrays(mask)
    found = forward(tiles)(q, k, v, hopper_lists(mask, mask, tiles))
    assert_close([found], by_the_formula(q, k, v, back, mask)[:1], SHARE)


@interpreted
@pytest.mark.slow
def test_mapping_over_a_new_axis_equals_a_loop():
    mask = rows("packed tightly")
    q, k, v, _ = arrays(mask)
    each = jax.jit(lambda q: interpret(q, k, v, mask, mask))
    found = jax.jit(jax.vmap(each))(jnp.stack([q, -q]))
    np.testing.assert_array_equal(found, jnp.stack([each(q), each(-q)]))


def test_log_sums_are_written_only_where_a_gradient_is_wanted(monkeypatch):
    given = []

    def run(call, kernel, own, rings, walk, out):
        given.append(len(out))
        return [jnp.zeros(*each) for each in out]

    monkeypatch.setattr(module, "_run", run)
    mask = TokenMask(ONE, ONE)
    q, k, v, _ = arrays(mask)
    lists = hopper_lists(mask, mask, SMALL)

    def form(q, k, v):
        return attention_mosaic(q, k, v, lists, SMALL)[0]

    jax.eval_shape(form, q, k, v)
    assert given == [1]
    jax.eval_shape(jax.grad(lambda q: form(q, k, v).sum().astype(jnp.float32)), q)
    assert given == [1, 2, 1, 2]  # forward, dq, dk and dv


@pytest.mark.parametrize(
    ("dtype", "tile", "reason"),
    [
        ("float32", (128, 128, 8, 2), "takes bfloat16 and float16, not float32"),
        ("bfloat16", (64, 128, 8, 2), "has 128 or 256 own tokens"),
        ("bfloat16", (128, 128, 4, 2), "own tokens.* and 8 warps"),
        ("bfloat16", (128, 128, 8, 1), "2 stages or more"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(dtype, tile, reason, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETER", object)
    mask = TokenMask(ONE, ONE)
    with pytest.raises(ValueError, match=reason):
        attention_plan(mask, mask, 64, dtype, "pallas_mosaic_gpu", (tile,))


def test_a_jax_too_old_is_told(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETER", None)
    mask = TokenMask(ONE, ONE)
    with pytest.raises(ValueError, match="too old for pallas_mosaic_gpu"):
        attention(*arrays(mask)[:3], mask, "pallas_mosaic_gpu")


@pytest.mark.gpu
def test_a_hopper_gpu_computes_the_formula():
    if not jax.devices()[0].device_kind.startswith("NVIDIA H"):
        pytest.skip("needs an H100 or H200")
    on_this_device("pallas_mosaic_gpu", "bfloat16", 0.02)
