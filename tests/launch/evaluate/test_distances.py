# SPDX-License-Identifier: Apache-2.0
"""Distances of two sets: laws, a slow definition, and damage that they see."""

import numpy as np
import pytest

from launch.evaluate.distances import frechet, jedi, spectrum_distance

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(500, 4)), RNG.normal(size=(400, 4))


def test_equal_sets_are_at_distance_0():
    assert frechet(A, A) == pytest.approx(0, abs=1e-6)
    assert jedi(A, A) == 0 == spectrum_distance([*A], [*A])


def test_a_shift_counts_squared_in_frechet():
    assert frechet(A, A + np.array([3.0, 0, 4.0, 0])) == pytest.approx(25)


def test_frechet_of_diagonal_normals_is_that_of_their_deviations():
    """Means apart: the squared distance of the vectors of deviations."""
    scale = np.array([1.0, 2.0, 3.0, 0.5])
    white = np.linalg.qr(A - A.mean(axis=0))[0] * np.sqrt(len(A) - 1)
    expected = np.square(scale - 1).sum()
    assert frechet(white, white * scale) == pytest.approx(expected)


def test_jedi_is_the_mean_discrepancy_of_its_kernel():
    """With all pairs, and x·y / d to the power of two, times 100."""

    def kernel(x, y):
        return np.square(x @ y.T / x.shape[1]).mean()

    slow = 100 * (kernel(A, A) + kernel(B, B) - 2 * kernel(A, B))
    assert jedi(A, B) == pytest.approx(slow)


@pytest.mark.parametrize("distance", [frechet, jedi])
def test_damage_is_farther_than_another_sample(distance):
    floor = distance(A, B)
    assert distance(A, 1.5 * B) > 5 * floor
    assert distance(A, B + 1) > 5 * floor
    assert distance(A, np.repeat(B[:4], 100, axis=0)) > 5 * floor


def test_the_distance_of_spectra_is_in_decibels():
    louder = [row + 3 for row in A]
    assert spectrum_distance([*A], louder) == pytest.approx(3)
