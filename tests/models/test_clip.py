# SPDX-License-Identifier: Apache-2.0
"""CLIP's text encoders: causal, and one vector taken at the end of each text."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.models.clip import CLIPConfig, CLIPEncoder, LayerNorm
from pyramid_jax.pipeline.prompts import abstract_encoder
from pyramid_jax.sharding import unbox

CONFIG = CLIPConfig(
    vocabulary=20, width=16, heads=2, mlp_width=24, blocks=2, positions=8, projection=6
)
END = 19  # the largest id
IDS = np.array([[17, 3, 1, 4, END, 0, 0, 0]], np.int32)
CLIP_G = CLIPConfig(
    width=1280, heads=20, mlp_width=5120, blocks=32, quick_gelu=False, projection=1280
)


@pytest.fixture(scope="module")
def params():
    return unbox(jax.jit(CLIPEncoder(CONFIG).init)(jax.random.key(0), IDS))


@pytest.fixture(scope="module")
def encode(params):
    """The encoder with some of its config changed."""
    calls = {}

    def run(ids: np.ndarray, **change: object):
        key = tuple(change.items())
        cfg = replace(CONFIG, **change)
        weights = dict(params["params"])
        if cfg.projection is None:
            del weights["project"]
        calls.setdefault(key, jax.jit(CLIPEncoder(cfg).apply))
        return calls[key]({"params": weights}, ids)

    return run


def assert_close(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (CLIPConfig(), 123_060_480),
        (CLIPConfig(projection=768), 123_650_304),
        (CLIP_G, 694_659_840),
    ],
)
def test_released_encoders_have_their_numbers_of_parameters(cfg, count):
    assert (
        sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_encoder(cfg))) == count
    )


def test_what_follows_the_end_has_no_effect(encode):
    other = IDS.copy()
    other[:, 5:] = [END, 3, END]
    before, after = encode(IDS), encode(other)
    np.testing.assert_array_equal(before.pooled, after.pooled)
    np.testing.assert_array_equal(before.features[:, :5], after.features[:, :5])
    assert np.abs(before.features - after.features)[:, 5:].max() > 1e-3


def test_shorter_rows_give_the_same_vector(encode):
    assert_close(encode(IDS).pooled, encode(IDS[:, :5]).pooled)


def test_every_word_of_a_text_matters(encode):
    for place in range(4):
        other = np.where(np.arange(8) == place, 7, IDS).astype(np.int32)
        assert np.abs(encode(IDS).pooled - encode(other).pooled).max() > 1e-4


def test_the_vector_is_taken_at_the_first_end(encode):
    """The end is the largest id or a given one."""
    ids = np.array([[17, 3, 5, END, END, 5, 0, 0]], np.int32)
    for end, place in ((None, 3), (END, 3), (5, 2)):
        encoding = encode(ids, end=end, projection=None)
        np.testing.assert_array_equal(encoding.pooled, encoding.features[:, place])


def test_the_projection_is_a_linear_map_of_the_state(encode, params):
    state = encode(IDS, projection=None).pooled
    kernel = params["params"]["project"]["kernel"]
    assert_close(encode(IDS).pooled, np.asarray(state) @ np.asarray(kernel))


def test_the_two_activations_differ_as_their_formulas_do(encode):
    """They are near each other everywhere, and equal nowhere but at zero."""
    error = np.abs(encode(IDS).features - encode(IDS, quick_gelu=False).features)
    assert 1e-5 < error.max() < 0.2


def test_a_norm_has_weight_and_bias():
    x = jnp.asarray([[[1.0, 3.0]]])
    weights = {"weight": jnp.asarray([2.0, 4.0]), "bias": jnp.asarray([1.0, 0.0])}
    normed = LayerNorm(0.0).apply({"params": weights}, x)
    assert_close(normed, [[[-1.0, 4.0]]])
