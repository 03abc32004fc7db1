# SPDX-License-Identifier: Apache-2.0
"""Small layers against recorded numbers and their formulas in float64 numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from pyramid_jax import sharding
from pyramid_jax.kernels.attention import attention
from pyramid_jax.mask import TokenMask
from pyramid_jax.models import layers, linear

KEY = jax.random.key(0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("cell", "column", "value"),
    [
        (0, 0, 0.0),
        (0, 384, 1.0),
        (1, 0, 0.32719472),
        (1, 1, 0.31971943),
        (1, 384, 0.94495696),
        (100, 0, 0.94053000),
        (100, 5, -0.96134835),
        (100, 390, -0.83030450),
        (191, 5, -0.07716066),
    ],
)
def test_the_position_table_is_that_of_the_original(cell, column, value):
    table = layers.position_table(192, 64, 1536)
    assert table.shape == (192, 768) and table.dtype == np.float32
    assert table[cell, column] == pytest.approx(value, abs=2e-7)


def test_whole_positions_are_rows_of_the_table():
    table = layers.position_table(12, 4, 32)
    rows = layers.interpolate_table(table, jnp.array([[0.0, 3.0, 11.0]]))
    np.testing.assert_array_equal(rows, table[None, [0, 3, 11]])


def test_positions_between_cells_are_the_mean_of_those_that_a_token_covers():
    """Half the size: the mean of 2 cells; a quarter: of the middle 2 of 4."""
    table, i = layers.position_table(12, 4, 32), np.arange(3)
    for size, cells in ((2, (0, 1)), (4, (1, 2))):
        places = (i + 0.5) * size - 0.5
        rows = layers.interpolate_table(table, jnp.asarray(places, jnp.float32)[None])
        mean = (table[i * size + cells[0]] + table[i * size + cells[1]]) / 2
        np.testing.assert_allclose(rows[0], mean, rtol=0, atol=1e-7)


# ---------------------------------------------------------------------------- the clock


def test_time_features_are_those_of_the_original():
    features = layers.sinusoid(jnp.array([[500.25]]))[0, 0]
    recorded = {
        0: -0.74064392,
        1: 0.84569323,
        2: 0.94237143,
        127: 0.99855542,
        128: -0.67189771,
        129: 0.53366935,
        255: 0.05373136,
    }
    # At time 500 the last bit of a float32 angle is 3e-5.
    for place, value in recorded.items():
        assert features[place] == pytest.approx(value, abs=3e-5)


def test_time_0_has_cosines_of_1_and_sines_of_0():
    features = layers.sinusoid(jnp.zeros((1, 1)))[0, 0]
    np.testing.assert_array_equal(features, np.repeat([1.0, 0.0], 128))


# ------------------------------------------------------------------ vectors of segments


@pytest.mark.parametrize("segments", [1, 2, 4, 7])
def test_every_token_gets_the_vector_of_its_segment(segments):
    """One vector, a chain of selections, a product: three ways, one meaning."""
    vectors = normal(2, segments, 6)
    segment = np.random.default_rng(1).integers(segments, size=(2, 9))
    tokens = layers.segment_vectors(jnp.asarray(vectors), jnp.asarray(segment))
    expected = np.take_along_axis(vectors, segment[..., None], axis=1)
    np.testing.assert_array_equal(np.broadcast_to(tokens, (2, 9, 6)), expected)


@pytest.mark.parametrize("count", [3, 6])
def test_the_gradient_of_a_vector_is_the_sum_over_its_tokens(count):
    vectors, back = jnp.asarray(normal(2, count, 6)), normal(2, 9, 6)
    segment = np.random.default_rng(1).integers(count, size=(2, 9))
    order = jnp.asarray(segment)
    _, pull = jax.vjp(lambda x: layers.segment_vectors(x, order), vectors)
    expected = np.zeros((2, count, 6))
    for row, column in np.ndindex(2, 9):
        expected[row, segment[row, column]] += back[row, column]
    np.testing.assert_allclose(pull(jnp.asarray(back))[0], expected, atol=1e-5)


def test_the_vector_of_padding_is_finite():
    vectors, segment = jnp.asarray(normal(1, 7, 6)), jnp.array([[-1, 0]])
    for count in (1, 3, 7):
        assert jnp.isfinite(layers.segment_vectors(vectors[:, :count], segment)).all()


def test_fresh_modulation_does_nothing():
    module = layers.Modulation(3, 8, "float32")
    vectors, _ = module.init_with_output(KEY, jnp.asarray(normal(1, 2, 8)))
    of_tokens = module.of_tokens(vectors, jnp.array([[0, 1, 1]]))
    assert len(of_tokens) == 3
    for vector in of_tokens:
        np.testing.assert_array_equal(vector, 0.0)


# -------------------------------------------------------------------------------- norms


def test_rms_norm_is_its_formula():
    x, weight = jnp.asarray(3 * normal(2, 4, 8)), normal(8)
    y = layers.RMSNorm(1e-5).apply({"params": {"weight": weight}}, x)
    exact = np.float64(x)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, exact * weight, rtol=1e-5)


def test_layer_norm_is_its_formula():
    x = 3 * normal(2, 4, 8) + 100
    exact = np.float64(x)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x)), exact, atol=2e-5)


def test_norms_of_bfloat16_are_computed_in_float32():
    x = jnp.asarray(100 * normal(1, 4, 256)).astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    np.testing.assert_array_equal(layers.layer_norm(x), layers.layer_norm(wide))
    module = layers.RMSNorm(1e-6)
    params = {"params": {"weight": jnp.ones(256)}}
    narrow = module.apply(params, x)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, module.apply(params, wide).astype(x.dtype))


# -------------------------------------------------------------------------------- dense


def test_fused_projections_start_like_separate_ones():
    """Xavier uniform for 24 to (heads 4, dim 6): bounded by sqrt(6 / (24 + 24))."""
    axes = ("embed", None, "heads", None)
    module = linear.dense((3, 4, 6), axes, "float32")
    params = jax.eval_shape(module.init, KEY, jnp.zeros((1, 24)))["params"]
    kernel, bias = params["kernel"], params["bias"]
    assert kernel.value.shape == (24, 3, 4, 6) and kernel.names == axes
    assert bias.value.shape == (3, 4, 6) and bias.names == axes[1:]
    weights = module.init(KEY, jnp.zeros((1, 24)))["params"]["kernel"].value
    bound = (6 / 48) ** 0.5
    assert 0.98 * bound < jnp.abs(weights).max() <= bound
    assert weights.std() == pytest.approx(bound / 3**0.5, rel=0.03)


class Block(nn.Module):
    """Attention and an MLP of width 16."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: TokenMask) -> jax.Array:
        heads = x.reshape(1, -1, 2, 4)
        x = attention(heads, heads, heads, mask, "blocks").reshape(x.shape)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(layers.layer_norm(x))))


def called(mask: TokenMask, weights: Any, _: None, x: jax.Array) -> Any:
    return Block().apply({"params": weights}, x, mask)


def test_the_backward_pass_of_a_stack_repeats_no_product_and_is_given_little_else():
    x, order = jnp.ones((1, 6, 8)), jnp.zeros((1, 6), jnp.int32)
    block, mask = Block(), TokenMask(order, order)
    weights = layers.stacked(jax.random.key(0), block, 3, x, mask)
    one = jax.tree.map(lambda x: x[0], weights)

    def alone(weights, x):
        return called(mask, weights, None, x).sum()

    def stack(weights, x):
        return layers.scan(partial(called, mask), weights, (x,))[0].sum()

    gradient = jax.make_jaxpr(jax.grad(stack, (0, 1)))(weights, x)
    once = str(jax.make_jaxpr(jax.grad(alone, (0, 1)))(one, x))
    for repeated in ("dot_general[", "while["):  # a loop walks the blocks of attention
        assert once.count(repeated) == str(gradient).count(repeated) > 0
    forward = next(e for e in gradient.eqns if e.primitive.name == "scan")
    wide = [x for x in forward.outvars if x.aval.shape == (3, 1, 6, 16)]
    assert len(wide) == 1  # the product; GELU would store four more


def test_a_stack_has_the_values_and_gradients_of_its_blocks_one_after_the_other():
    x, order = (
        jax.random.normal(jax.random.key(1), (1, 6, 8)),
        jnp.zeros((1, 6), jnp.int32),
    )
    block, mask = Block(), TokenMask(order, order)
    weights = layers.stacked(jax.random.key(0), block, 3, x, mask)

    def loop(weights, x):
        for layer in range(3):
            one = jax.tree.map(lambda w, layer=layer: w[layer], weights)
            x = called(mask, one, None, x)
        return jnp.square(x).sum()

    def stack(weights, x, remat):
        (x,) = layers.scan(partial(called, mask), weights, (x,), remat=remat)
        return jnp.square(x).sum()

    expected = jax.value_and_grad(loop, (0, 1))(weights, x)
    for remat in layers.REMAT:
        ours = jax.value_and_grad(stack, (0, 1))(weights, x, remat)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_blocks_with_weights_and_inputs_of_their_own_are_those_of_a_stack():
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    weights, inputs = jnp.arange(1.0, 4.0), jnp.arange(3.0)

    def add(weight: jax.Array, each: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(weight * x) + each

    (rolled,) = layers.scan(add, weights, (x,), inputs)
    (unrolled,) = layers.scan(add, layers.unstacked(weights), (x,), inputs)
    np.testing.assert_allclose(rolled, unrolled, rtol=1e-6, atol=1e-6)
    for trees in (weights, layers.unstacked(weights)):
        noted = partial(layers.scan, lambda *x: (add(*x), {"old": x[2]}), noting=True)
        (last,), notes = noted(trees, (x,), inputs)
        np.testing.assert_allclose(last, rolled, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(notes["old"][0], x)
        assert notes["old"].shape == (3, *x.shape)
        made = layers.each(lambda one: {"twice": 2 * one}, trees)
        np.testing.assert_array_equal(made["twice"], 2 * weights)


def test_what_is_stored_of_blocks_changes_memory_and_no_gradient():
    weights = jax.random.normal(jax.random.key(0), (6, 2, 32, 32)) / 8
    x = jax.random.normal(jax.random.key(1), (1, 512, 32))

    def block(weights: jax.Array, _: None, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(jnp.sin(x @ weights[0]), "attention")
        return x + jnp.sin(jnp.exp(jnp.tanh(hidden @ weights[1])))

    def loss(weights: jax.Array, remat: str) -> jax.Array:
        (last,) = layers.scan(block, weights, (x,), remat=remat)
        return jnp.square(last).sum()

    compiled = {
        remat: jax.jit(jax.grad(loss), static_argnums=1).lower(weights, remat).compile()
        for remat in layers.REMAT
    }
    expected = compiled["everything"](weights)
    for program in compiled.values():
        np.testing.assert_allclose(program(weights), expected, rtol=1e-4, atol=1e-4)
    used = {
        remat: program.memory_analysis().temp_size_in_bytes
        for remat, program in compiled.items()
    }
    stream = 6 * x.nbytes
    assert used["everything"] - used["products"] > 0.9 * stream
    assert used["products"] - used["attention"] > 0.9 * stream
    assert used["attention"] - used["nothing"] > 0.9 * stream


# ------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("contract", [1, 2])
def test_weight_gradients_are_float32_sums_on_request(contract: int):
    x = jnp.asarray(normal(3, 16, *(2, 4)[-contract:]))

    def gradients(wanted: bool) -> Any:
        with sharding.float32_sums(wanted):
            axes = (*[None] * contract, None, None)
            layer = linear.dense((2, 3), axes, "bfloat16", contract=contract)
            params = sharding.unbox(layer.init(KEY, x)["params"])

            def loss(params: Any, x: jax.Array) -> jax.Array:
                return jnp.square(layer.apply({"params": params}, x)).sum(
                    dtype="float32"
                )

            return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    (value, (own, back)), (plain_value, (plain, plain_back)) = map(
        gradients, (True, False)
    )
    assert value == plain_value
    np.testing.assert_array_equal(back, plain_back)
    np.testing.assert_allclose(own["kernel"], plain["kernel"], rtol=0.02, atol=0.1)
    rounded = own["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    assert own["kernel"].dtype == jnp.float32 and (own["kernel"] != rounded).any()
    rounded = plain["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(plain["kernel"], rounded)
