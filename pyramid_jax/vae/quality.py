# SPDX-License-Identifier: Apache-2.0
"""Similarity of two videos: PSNR and SSIM of every frame."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pyramid_jax.shapes import Array

RANGE = 2.0  # of pixels in [-1, 1]
WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian window, in pixels
STABILITY = (0.01, 0.03)  # SSIM's two constants, as fractions of the range


def psnr(
    a: Float[Array, "*b h w c"], b: Float[Array, "*b h w c"]
) -> Float[jax.Array, "*b"]:
    """Peak signal to noise ratio of every frame in decibels; infinite for equal ones.

    Args:
        a, b: pixels in [-1, 1].
    """
    error = jnp.square(_float(a) - _float(b)).mean(axis=(-3, -2, -1))
    return 10 * jnp.log10(RANGE**2 / error)


def ssim(
    a: Float[Array, "*b h w c"], b: Float[Array, "*b h w c"]
) -> Float[jax.Array, "*b"]:
    """Structural similarity of every frame, at most 1, which equal frames have.

        (2 μa μb + C1) (2 σab + C2) / ((μa² + μb² + C1) (σa² + σb² + C2))

    with moments under a Gaussian window; the mean over all places where the window lies
    inside the frame, and over colours.

    Args:
        a, b: pixels in [-1, 1].

    Raises:
        ValueError: a frame is smaller than the window.

    Source: Wang et al., "Image quality assessment: from error visibility to structural
    similarity" (2004).
    """
    height, width = a.shape[-3:-1]
    if min(height, width) < WINDOW:
        raise ValueError(
            f"frames of {height}x{width} pixels are smaller than SSIM's window of "
            f"{WINDOW}x{WINDOW}; compare larger frames, or use psnr"
        )
    a, b = _float(a), _float(b)
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a = _smooth(a * a) - mean_a**2
    variance_b = _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = ((fraction * RANGE) ** 2 for fraction in STABILITY)
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (above / below).mean(axis=(-3, -2, -1))


def _float(x: Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _smooth(x: Float[jax.Array, "*b h w c"]) -> Float[jax.Array, "*b _ _ c"]:
    """Means under the window, at every place where it fits."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offset / DEVIATION) ** 2)
    weights = (weights / weights.sum()).tolist()
    for axis in (-3, -2):
        places = x.shape[axis] - WINDOW + 1
        shifted = (
            jax.lax.slice_in_dim(x, i, i + places, axis=axis) for i in range(WINDOW)
        )
        x = jax.tree.reduce(
            jnp.add, [w * part for w, part in zip(weights, shifted, strict=True)]
        )
    return x
