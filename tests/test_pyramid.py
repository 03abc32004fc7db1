# SPDX-License-Identifier: Apache-2.0
"""Laws of the pyramidal flow. Its functions are linear: Jacobians make laws exact."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import pyramid

# Computed with the original scheduler (float32): for each stage, the noise at its start
# and its end, the time at its start, and the last of its 1000 times.
RECORDED = {
    "released": (
        {},
        [
            (1.0, 0.667, 1000.0, 744.256),
            (0.800240, 0.334, 744.0, 386.358),
            (0.500750, 0.0, 386.0, 1.385),
        ],
    ),
    "shift": (
        {"shift": 3.0},
        [
            (1.0, 0.857326, 1000.0, 957.743),
            (0.923183, 0.600719, 957.7007, 829.2877),
            (0.750562, 0.0, 829.1591, 3.8202),
        ],
    ),
    "two stages": (
        {"edges": (0, 0.5, 1)},
        [(1.0, 0.5, 1000.0, 572.428), (0.666667, 0.0, 572.0, 1.571)],
    ),
    "four stages": (
        {"edges": (0, 0.25, 0.5, 0.75, 1)},
        [
            (1.0, 0.75, 1000.0, 825.175),
            (0.857143, 0.5, 825.0, 574.251),
            (0.666667, 0.25, 574.0, 281.293),
            (0.4, 0.0, 281.0, 1.28),
        ],
    ),
    "gamma": (
        {"gamma": 0.2},
        [
            (1.0, 0.667, 1000.0, 759.241),
            (0.83069, 0.334, 759.0, 400.359),
            (0.551252, 0.0, 400.0, 1.399),
        ],
    ),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("name", RECORDED)
def test_stages_are_those_of_the_original_scheduler(name):
    options, recorded = RECORDED[name]
    for stage, (start, end, first, last) in zip(
        pyramid.stages(**options), recorded, strict=True
    ):
        assert 1 - stage.start == pytest.approx(start, abs=6e-7)
        assert 1 - stage.end == pytest.approx(end, abs=6e-7)
        assert stage.time_start == pytest.approx(first, abs=1.2e-4)
        time = pyramid.time(np.array([1.0, 0.001]), stage)
        np.testing.assert_allclose(time, [first, last], rtol=0, atol=1.2e-4)


def test_one_stage_is_plain_flow_matching():
    (stage,) = pyramid.stages((0, 1))
    assert stage[:3] == (0.0, 1.0, 1000.0)


@pytest.mark.parametrize("options", [options for options, _ in RECORDED.values()])
def test_the_clock_never_stops_nor_jumps_between_stages(options):
    stages = pyramid.stages(**options)
    for before, after in pairwise(stages):
        assert before.time_start > before.time_end == after.time_start


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_without_a_shift_the_clock_divides_its_range_by_the_noise_removed(gamma):
    """Times are whole numbers, and the last is 1, so up to 1 in 1000."""
    stages = pyramid.stages(gamma=gamma)
    removed = np.array([s.end - s.start for s in stages])
    spent = np.array([s.time_start - s.time_end for s in stages])
    np.testing.assert_allclose(spent / 1000, removed / removed.sum(), atol=1.01e-3)


@pytest.mark.parametrize(
    "edges", [(), (0.0,), (0.1, 1.0), (0.0, 0.9), (0.0, 0.5, 0.5, 1.0), (1.0, 0.0)]
)
def test_edges_that_do_not_rise_from_0_to_1_are_refused(edges):
    with pytest.raises(ValueError, match="must increase from 0 to 1"):
        pyramid.stages(edges)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 0.34])
def test_a_correlation_that_no_noise_can_have_is_refused(gamma):
    with pytest.raises(ValueError, match=r"must be in \(0, 1/3\]"):
        pyramid.stages(gamma=gamma)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="must be positive"):
        pyramid.stages(shift=shift)


# --------------------------------------------------------------------------- resolution


def test_down_undoes_up():
    x = normal(0, 2, 3, 4, 6, 5)
    np.testing.assert_allclose(pyramid.down(pyramid.up(x)), x, rtol=1e-15)


def test_up_copies_and_down_averages_blocks():
    x = np.arange(4.0).reshape(2, 2, 1)
    copied = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(pyramid.up(x)[..., 0], copied)
    np.testing.assert_array_equal(pyramid.down(x), [[[1.5]]])


def test_levels_go_from_coarse_to_fine_and_end_with_the_latent_itself():
    x = normal(0, 2, 8, 16, 3)
    levels = pyramid.levels(x, 3)
    assert [level.shape for level in levels] == [(2, 2, 4, 3), (2, 4, 8, 3), x.shape]
    assert levels[-1] is x
    whole = x.reshape(2, 2, 4, 4, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(levels[0], whole, rtol=0, atol=1e-15)


def test_the_noise_pyramid_is_white_at_every_level():
    """With Jacobian A of a level, the covariance of its noise is A·Aᵀ."""
    levels = jax.jacobian(lambda z: pyramid.noise_levels(z, 3))(jnp.zeros((8, 8, 1)))
    for side, level in zip((2, 4, 8), levels, strict=True):
        a = level.reshape(side * side, 64)
        np.testing.assert_allclose(a @ a.T, np.eye(side * side), atol=1e-6)


# -------------------------------------------------------------- the path inside a stage


def test_ends_of_a_stage_are_affine_in_latent_and_noise():
    clean, coarser, z = normal(0, 3, 5)
    start, end = pyramid.endpoints(clean, coarser, z, 0.25, 0.75)
    np.testing.assert_array_equal(start, 0.25 * coarser + 0.75 * z)
    np.testing.assert_array_equal(end, 0.75 * clean + 0.25 * z)


def test_the_first_stage_starts_from_noise_and_the_last_ends_clean():
    clean, coarser, z = normal(0, 3, 5)
    first, *_, last = pyramid.stages()
    start, _ = pyramid.endpoints(clean, coarser, z, first.start, first.end)
    _, end = pyramid.endpoints(clean, coarser, z, last.start, last.end)
    np.testing.assert_array_equal(start, z)
    np.testing.assert_array_equal(end, clean)


def test_the_path_runs_from_start_at_1_to_end_at_0():
    start, end = normal(0, 2, 5)
    np.testing.assert_array_equal(pyramid.interpolate(start, end, 1.0), start)
    np.testing.assert_array_equal(pyramid.interpolate(start, end, 0.0), end)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_velocity_is_the_derivative_of_the_path(sigma):
    start, end = (jnp.asarray(x, jnp.float32) for x in normal(0, 2, 5))
    _, slope = jax.jvp(
        lambda sigma: pyramid.interpolate(start, end, sigma), (sigma,), (1.0,)
    )
    np.testing.assert_allclose(slope, pyramid.velocity(start, end), rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "last_step"),
    [(1, True), (2, True), (10, True), (2, False), (10, False)],
)
def test_euler_is_exact_for_a_constant_velocity(steps, last_step):
    start, end = normal(0, 2, 5)
    x, visited = start, pyramid.sigmas(steps, last_step)
    for sigma, following in pairwise(visited):
        x = pyramid.euler(x, pyramid.velocity(start, end), sigma, following)
    np.testing.assert_allclose(x, end, rtol=0, atol=1e-14)


def test_ten_steps_are_those_of_the_original():
    recorded = [1, 0.889, 0.778, 0.667, 0.556, 0.445, 0.334, 0.223, 0.112, 0.001, 0]
    np.testing.assert_allclose(pyramid.sigmas(10), recorded, rtol=0, atol=1e-15)


def test_twenty_steps_are_those_of_the_original():
    recorded = """
    1.000000 0.947421 0.894842 0.842263 0.789684 0.737105 0.684526 0.631947 0.579368
    0.526789 0.474211 0.421632 0.369053 0.316474 0.263895 0.211316 0.158737 0.106158
    0.053579 0.001000 0.000000"""
    expected = [float(sigma) for sigma in recorded.split()]
    np.testing.assert_allclose(pyramid.sigmas(20), expected, rtol=0, atol=6e-7)


def test_times_of_ten_steps_are_those_of_the_original():
    recorded = """
    744.000 704.262 664.524 624.786 585.048 545.310 505.572 465.834 426.096 386.358"""
    expected = [float(time) for time in recorded.split()]
    times = pyramid.time(pyramid.sigmas(10)[:-1], pyramid.stages()[1])
    np.testing.assert_allclose(times, expected, rtol=0, atol=1e-9)


def test_leaving_out_the_last_step_merges_it_with_the_one_before():
    every, fewer = pyramid.sigmas(10), pyramid.sigmas(10, last_step=False)
    np.testing.assert_array_equal(fewer, np.delete(every, 9))


@pytest.mark.parametrize(("steps", "last_step"), [(0, True), (-1, True), (1, False)])
def test_too_few_steps_are_refused(steps, last_step):
    with pytest.raises(ValueError, match=rf"{steps} steps per stage: give 1 or more"):
        pyramid.sigmas(steps, last_step)


# ---------------------------------------------------------- the jump between two stages


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
@pytest.mark.parametrize("finer", [1, 2])
def test_renoising_leaves_white_noise_and_the_right_signal(gamma, finer):
    """At a jump the signal fraction becomes s and the noise covariance (1 - s)² · I.

    `renoise` is linear, so its Jacobian gives both exactly: no sampling, no luck.
    """
    stages = pyramid.stages(gamma=gamma)
    e, s = stages[finer - 1].end, stages[finer].start
    coarse, fine = jnp.zeros((2, 2, 1)), jnp.zeros((4, 4, 1))
    from_x, from_z = jax.jacobian(pyramid.renoise, (0, 1))(coarse, fine, s, gamma)
    from_x, from_z = from_x.reshape(16, 4), from_z.reshape(16, 16)

    np.testing.assert_allclose(e * from_x.sum(1), s, rtol=1e-6)
    noise = jnp.concatenate([(1 - e) * from_x, from_z], axis=1)
    np.testing.assert_allclose(noise @ noise.T, (1 - s) ** 2 * np.eye(16), atol=1e-6)


@pytest.mark.parametrize(
    ("finer", "gain", "spread"),
    [(1, 0.5998800255, 0.6930281249), (2, 0.7496251922, 0.4336618880)],
)
def test_jumps_have_the_coefficients_of_the_original(finer, gain, spread):
    s = pyramid.stages()[finer].start
    one, none = np.ones((1, 1, 1)), np.zeros((2, 2, 1))
    signal = pyramid.jump(one, none, s)
    noise = pyramid.jump(np.zeros((1, 1, 1)), none + 1.0, s)
    np.testing.assert_allclose(signal, gain, rtol=2e-8)  # recorded in float32
    np.testing.assert_allclose(noise, spread, rtol=2e-8)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_has_unit_variance_and_is_correlated_inside_blocks_alone(gamma):
    a = jax.jacobian(pyramid.block_noise)(jnp.zeros((4, 4, 1)), gamma).reshape(16, 16)
    y, x = np.divmod(np.arange(16), 4)
    block = y // 2 * 2 + x // 2
    same = block.reshape(-1, 1) == block.reshape(1, -1)
    expected = np.where(same, -gamma, 0.0) + (1 + gamma) * np.eye(16)
    np.testing.assert_allclose(a @ a.T, expected, atol=1e-6)


def test_numpy_in_gives_numpy_out():
    x, z = normal(0, 2, 2, 1), normal(1, 4, 4, 1)
    assert isinstance(pyramid.renoise(x, z, 0.2), np.ndarray)
    assert isinstance(pyramid.levels(z, 2)[0], np.ndarray)


def test_corrective_noise_is_block_noise_bit_for_bit():
    z = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(pyramid.jump_noise(z), pyramid.block_noise(z))


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
@pytest.mark.parametrize("renoising", ["white", "none"])
def test_other_noise_leaves_the_correlation_that_is_documented(gamma, renoising):
    """The covariance at a jump, exactly, from the Jacobian."""
    s = pyramid.stages((0, 0.5, 1), gamma=gamma)[1].start
    e = pyramid.stages((0, 0.5, 1), gamma=gamma)[0].end

    def jumped(x: jax.Array, z: jax.Array) -> jax.Array:
        return pyramid.jump(x, pyramid.jump_noise(z, gamma, renoising), s, gamma)

    coarse, fine = jnp.zeros((1, 1, 1)), jnp.zeros((2, 2, 1))
    from_x, from_z = jax.jacobian(jumped, (0, 1))(coarse, fine)
    noise = np.hstack([(1 - e) * from_x.reshape(4, 1), from_z.reshape(4, 4)])
    left = gamma / (1 + gamma)
    expected = np.full((4, 4), left) + (1 - left) * np.eye(4) * (renoising == "white")
    np.testing.assert_allclose(noise @ noise.T, (1 - s) ** 2 * expected, atol=1e-6)
    np.testing.assert_allclose(e * from_x.sum(), 4 * s, rtol=1e-6)
