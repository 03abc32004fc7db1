# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.models.vae import VAEConfig, decode, initialise_vae
from pyramid_jax.vae.widening import widened

NARROW = VAEConfig(
    latent=4,
    encoder_widths=(4, 4),
    decoder_widths=(4, 8),
    encoder_layers=(0, 0),
    decoder_layers=(0, 1),
    spatial=(True, False),
    temporal=(True, False),
    groups=2,
    dtype="float32",
)


def weights(cfg: VAEConfig, seed: int = 0):
    init = partial(initialise_vae, cfg)
    shapes = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype("f"), shapes)


def test_a_wider_vae_computes_the_same_with_channels_that_differ():
    wide, narrow = replace(NARROW, decoder_widths=(8, 24)), weights(NARROW)
    params = widened(narrow, weights(wide))
    latents = jax.random.normal(jax.random.key(0), (1, 2, 4, 4, 4))
    run = jax.jit(decode, static_argnums=0)
    expected, _ = run(NARROW, narrow, latents)
    np.testing.assert_allclose(run(wide, params, latents)[0], expected, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], narrow["encoder"])
    kernel = params["decoder"]["head"]["convolution"]["kernel"]
    assert np.all(kernel[..., 0::2, :] != kernel[..., 1::2, :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_widths": (6, 8)}, "can't grow from .*whole multiple"),
        ({"decoder_widths": (2, 8)}, "can't grow from"),
        ({"decoder_layers": (0, 2)}, "not deeper"),
    ],
)
def test_what_is_not_wider_by_whole_factors_is_refused(change, message):
    like = weights(replace(NARROW, **change))
    with pytest.raises(ValueError, match=message):
        widened(weights(NARROW), like)
