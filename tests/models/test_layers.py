# SPDX-License-Identifier: Apache-2.0
"""Small layers against recorded numbers and their formulas in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.models import layers

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
    module = layers.dense((3, 4, 6), axes, "float32")
    params = jax.eval_shape(module.init, KEY, jnp.zeros((1, 24)))["params"]
    kernel, bias = params["kernel"], params["bias"]
    assert kernel.value.shape == (24, 3, 4, 6) and kernel.names == axes
    assert bias.value.shape == (3, 4, 6) and bias.names == axes[1:]
    weights = module.init(KEY, jnp.zeros((1, 24)))["params"]["kernel"].value
    bound = (6 / 48) ** 0.5
    assert 0.98 * bound < jnp.abs(weights).max() <= bound
    assert weights.std() == pytest.approx(bound / 3**0.5, rel=0.03)
