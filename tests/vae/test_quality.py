# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against their definitions, written out slowly."""

import jax
import numpy as np
import pytest

from pyramid_jax.vae import quality


def pictures(*shape: int) -> list[np.ndarray]:
    """A random picture in [-1, 1] and a similar one."""
    random = np.random.default_rng(0)
    a = random.uniform(-1, 1, shape).astype(np.float32)
    return [a, (0.8 * a + 0.1 * random.normal(size=shape)).astype(np.float32)]


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of a picture `h w c`, window by window, in float64."""
    offset = np.arange(11) - 5
    line = np.exp(-(offset**2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / line.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (i[y : y + 11, x : x + 11].astype(np.float64) for i in (a, b))
            mp, mq = ((window * i).sum((0, 1)) for i in (p, q))
            vp, vq = (
                (window * (i - m) ** 2).sum((0, 1)) for i, m in ((p, mp), (q, mq))
            )
            cross = (window * (p - mp) * (q - mq)).sum((0, 1))
            top = (2 * mp * mq + c1) * (2 * cross + c2)
            values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition_window_by_window():
    a, b = pictures(2, 13, 15, 3)
    expected = [slow_ssim(*frames) for frames in zip(a, b, strict=True)]
    np.testing.assert_allclose(quality.ssim(a, b), expected, rtol=1e-5)


def test_psnr_of_an_error_of_a_hundredth_of_the_range_is_forty_decibels():
    a = np.zeros((2, 3, 4, 4, 3), np.float32)
    np.testing.assert_allclose(quality.psnr(a, a + 0.02), np.full((2, 3), 40), 1e-5)


def test_equal_frames_are_perfect():
    a = pictures(2, 16, 16, 3)[0]
    assert np.isinf(quality.psnr(a, a)).all()
    np.testing.assert_allclose(quality.ssim(a, a), 1, rtol=1e-6)


def test_both_are_compiled_and_take_half_precision():
    a, b = pictures(1, 12, 12, 3)
    for measure in (quality.psnr, quality.ssim):
        whole = measure(a, b)
        half = jax.jit(measure)(*(x.astype(jax.numpy.bfloat16) for x in (a, b)))
        assert half.dtype == np.float32
        np.testing.assert_allclose(half, whole, rtol=0.01)


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="8x16 pixels are smaller than SSIM's window"):
        quality.ssim(*pictures(1, 8, 16, 3))
