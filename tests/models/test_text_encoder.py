# SPDX-License-Identifier: Apache-2.0
"""The text encoder on packed rows of token ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.models.text_encoder import TextConfig, TextEncoder
from pyramid_jax.shapes import Text

CONFIG = TextConfig(vocabulary=11, width=8, heads=2, blocks=2)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
SEGMENT = np.array([[0, 0, 0, 1, 1, 1, 1, -1]])


@pytest.fixture(scope="module")
def encode():
    """The encoder with fresh weights, for up to 3 segments."""
    module = TextEncoder(CONFIG)
    params = jax.jit(module.init, static_argnums=3)(jax.random.key(0), IDS, SEGMENT, 3)
    return jax.jit(lambda ids, segment: module.apply(params, ids, segment, 3))


def changed(place: int) -> np.ndarray:
    """`IDS` with another word at one place."""
    return np.where(np.arange(8) == place, 7, IDS)


def assert_close(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_segments_do_not_mix(encode):
    before, after = encode(IDS, SEGMENT), encode(changed(4), SEGMENT)
    np.testing.assert_array_equal(before.features[:, :3], after.features[:, :3])
    np.testing.assert_array_equal(before.pooled[:, 0], after.pooled[:, 0])
    assert jnp.abs(before.features - after.features)[:, 3:7].min(axis=1).max() > 1e-3
    assert jnp.abs(before.pooled - after.pooled)[:, 1].max() > 1e-3


def test_padding_is_ignored(encode):
    before, after = encode(IDS, SEGMENT), encode(changed(7), SEGMENT)
    np.testing.assert_array_equal(before.features[:, :7], after.features[:, :7])
    np.testing.assert_array_equal(before.pooled, after.pooled)


def test_a_segment_in_a_row_is_encoded_as_if_it_were_alone(encode):
    """Places count from the start of a segment, wherever that is."""
    packed = encode(IDS, SEGMENT)
    ids, segment = np.roll(IDS, -3, axis=1), np.array([[0] * 4 + [-1] * 4])
    alone: Text = encode(ids, segment)
    assert_close(packed.features[:, 3:7], alone.features[:, :4])
    assert_close(packed.pooled[:, 1], alone.pooled[:, 0])


def test_every_word_sees_the_words_before_and_after_it(encode):
    before, after = encode(IDS, SEGMENT), encode(changed(5), SEGMENT)
    difference = jnp.abs(before.features - after.features).max(axis=-1)[0]
    assert (difference[3:7] > 1e-4).all()


def test_the_order_of_words_matters(encode):
    swapped = IDS[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    before, after = encode(IDS, SEGMENT), encode(swapped, SEGMENT)
    assert jnp.abs(before.pooled - after.pooled)[:, 0].max() > 1e-3


def test_the_pooled_vector_is_the_mean_of_a_segment(encode):
    text = encode(IDS, SEGMENT)
    assert_close(text.pooled[:, 0], text.features[:, :3].mean(axis=1))
    assert_close(text.pooled[:, 1], text.features[:, 3:7].mean(axis=1))
    np.testing.assert_array_equal(text.pooled[:, 2], 0.0)
    np.testing.assert_array_equal(text.segment, SEGMENT)
