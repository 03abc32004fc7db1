# SPDX-License-Identifier: Apache-2.0
"""T5: distances are its only positions, and a row may hold several texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.models.t5 import (
    T5Config,
    T5Encoder,
    biased_attention,
    buckets,
    distance_bias,
)
from pyramid_jax.pipeline.prompts import abstract_encoder

CONFIG = T5Config(
    vocabulary=20, width=16, heads=2, head_dim=4, mlp_width=24, blocks=2, farthest=16
)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
SEGMENT = np.array([[0, 0, 0, 1, 1, 1, 1, -1]], np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(T5Encoder(CONFIG).init)(jax.random.key(0), IDS, SEGMENT)


@pytest.fixture(scope="module")
def encode(params):
    return jax.jit(T5Encoder(CONFIG).apply).__get__(params)


def changed(place: int) -> np.ndarray:
    """`IDS` with another word at one place."""
    return np.where(np.arange(8) == place, 7, IDS)


def assert_close(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_defaults_are_those_of_xxl():
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(abstract_encoder(T5Config()))]
    assert sum(sizes) == 4_762_310_656


def test_devices_hold_their_share_of_xxl_and_hardly_more():
    """4.8 B parameters on 8 devices: no device ever gathers the stacked weights."""
    mesh, cfg = sharding.device_mesh(data=1, fsdp=2, tensor=4), T5Config()
    boxed = abstract_encoder(cfg)
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    run = jax.jit(lambda params, *row: T5Encoder(cfg).apply({"params": params}, *row))
    memory = run.lower(like, ids, ids).compile().memory_analysis()
    share = 4 * 4_762_310_656 / 8
    assert share < memory.argument_size_in_bytes < 1.1 * share
    assert memory.temp_size_in_bytes < 0.1 * share


def test_a_word_has_the_same_features_wherever_its_text_stands(encode):
    right = np.array([[3, 1, 4, 0, 0, 0, 0, 0]]), np.array([[0] * 3 + [-1] * 5])
    left = (np.roll(x, 5, axis=1) for x in right)
    assert_close(encode(*right)[:, :3], encode(*left)[:, 5:])


def test_texts_of_a_row_are_encoded_as_if_each_were_alone(encode):
    packed = encode(IDS, SEGMENT)
    for segment, places in ((0, slice(0, 3)), (1, slice(3, 7))):
        alone = np.where(segment == SEGMENT, 0, -1)
        assert_close(packed[:, places], encode(IDS, alone)[:, places])


def test_padding_changes_nothing_and_stays_finite(encode):
    before, after = encode(IDS, SEGMENT), encode(changed(7), SEGMENT)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.isfinite(after).all()


def test_every_word_sees_those_before_and_behind_it(encode):
    difference = np.abs(encode(IDS, SEGMENT) - encode(changed(5), SEGMENT))
    assert (difference.max(axis=-1)[0, 3:7] > 1e-4).all()
    assert difference[0, :3].max() == 0


def test_the_order_of_words_matters(encode):
    """Word 5 stays where it is; its neighbours change places."""
    ids = IDS[:, [0, 1, 2, 5, 4, 3, 6, 7]]
    difference = np.abs(encode(IDS, SEGMENT) - encode(ids, SEGMENT))
    assert difference[0, 4].max() > 1e-3


def test_attention_is_that_of_every_head_computed_alone():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4)).astype(np.float32)
    bias = np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype(np.float32)
    attended = jax.jit(biased_attention)(q, k, v, bias)
    for b in range(2):
        for h in range(3):
            weights = np.exp(q[b, :, h] @ k[b, :, h].T + bias[b, h])
            weights /= weights.sum(axis=-1, keepdims=True)
            assert_close(attended[b, :, h], weights @ v[b, :, h])


def test_far_classes_grow_by_the_square_root_of_two():
    """Class 8 + k begins at 8 times the k-th power: n² >= 64 · 2^k, in integers."""
    for n in range(1, 400):
        far = 8 + max((k for k in range(8) if n * n >= 64 * 2**k), default=0)
        expected = n if n < 8 else far
        assert buckets(np.array([n, -n]), 32, 128).tolist() == [16 + expected, expected]


def test_a_bias_depends_on_the_head_and_on_the_distance_alone():
    table = np.arange(64, dtype=np.float32).reshape(32, 2)
    bias = distance_bias(jnp.asarray(table), 40, 128)
    for head in range(2):
        for offset in (-39, -1, 0, 1, 17):
            diagonal = np.diagonal(bias[head], offset)
            bucket = buckets(np.array([offset]), 32, 128)
            expected = table[bucket, head]
            np.testing.assert_array_equal(
                diagonal, np.broadcast_to(expected, diagonal.shape)
            )


def test_bfloat16_products_stay_near_float32(params, encode):
    half = T5Config(**{**vars(CONFIG), "dtype": "bfloat16"})
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    features = jax.jit(T5Encoder(half).apply)(weights, IDS, SEGMENT)
    assert features.dtype == jnp.float32
    error = np.abs(features - encode(IDS, SEGMENT))[:, :7]
    assert 1e-4 < error.max() < 0.1  # of values around 1, at 8 bits
