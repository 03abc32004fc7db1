# SPDX-License-Identifier: Apache-2.0
"""The noise of units, stages and videos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import pyramid
from pyramid_jax.noise import KeyedNoise
from tests.test_sampler import KEYS


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_noise_of_a_unit_is_white_at_its_start_and_block_noise_at_its_jumps(gamma):
    noise = KeyedNoise(jax.random.key_data(KEYS), (64, 64, 4), 3, gamma)(3, 5)
    assert [n.shape for n in (noise.start, *noise.jumps)] == [
        (2, 5, 16, 16, 4),
        (2, 5, 32, 32, 4),
        (2, 5, 64, 64, 4),
    ]
    for n, inside_block in ((noise.start, 0.0), *((n, -gamma) for n in noise.jumps)):
        variance = 1 / 4 + 3 / 4 * inside_block
        assert jnp.square(n).mean() == pytest.approx(1.0, abs=0.05)
        assert jnp.square(pyramid.down(n)).mean() == pytest.approx(variance, abs=0.02)


@pytest.mark.parametrize(("renoising", "variance"), [("white", 1.0), ("none", 0.0)])
def test_other_renoising_changes_jumps_only(renoising, variance):
    shape = jax.random.key_data(KEYS), (64, 64, 4), 3, 1 / 3
    drawn, usual = KeyedNoise(*shape, renoising)(1, 2), KeyedNoise(*shape)(1, 2)
    np.testing.assert_array_equal(drawn.start, usual.start)
    for n, block in zip(drawn.jumps, usual.jumps, strict=True):
        assert n.shape == block.shape
        assert jnp.square(n).mean() == pytest.approx(variance, abs=0.05)
        mean = jnp.square(pyramid.down(n)).mean()
        assert mean == pytest.approx(variance / 4, abs=0.02)


def test_units_stages_and_videos_have_noise_of_their_own():
    """Where two of them shared a key, their first values would be equal."""
    noise = KeyedNoise(jax.random.key_data(KEYS), (8, 8, 4), 3)
    a, b = noise(1, 1), noise(2, 1)
    parts = [n for noise in (a, b) for n in (noise.start, *noise.jumps)]
    first = np.ravel([part[:, :, :2, :2] for part in parts])
    assert len(np.unique(first)) == len(first)


def test_the_noise_of_a_unit_depends_on_its_number_alone():
    noise = KeyedNoise(jax.random.key_data(KEYS), (8, 8, 1), 3)
    known, traced = noise(2, 1), jax.jit(lambda unit: noise(unit, 1))(2)
    jax.tree.map(np.testing.assert_array_equal, known.start, traced.start)
