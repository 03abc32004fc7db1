# SPDX-License-Identifier: Apache-2.0
"""LPIPS, the perceptual distance of images: differences between features of VGG16."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax.models.layers import convolution
from pyramid_jax.sharding import named

# Convolutions of each slice of VGG16; all slices but the first begin by halving.
CONVOLUTIONS = (2, 2, 3, 3, 3)
SMALLEST = 2 ** (len(CONVOLUTIONS) - 1)
# Mean and deviation of VGG16's training images, for pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
# Where all features are zero; its square root is far below EPS.
TINY = 1e-30

Images = Float[jax.Array, "b h w 3"]


@dataclass(frozen=True)
class LPIPSConfig:
    """Sizes of the network whose features are compared; by default VGG16.

    Args:
        widths: channels of the five slices.
        dtype: of the convolutions; distances are float32.

    Raises:
        ValueError: not five widths.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.widths) != len(CONVOLUTIONS):
            raise ValueError(
                f"LPIPS widths {self.widths} must be {len(CONVOLUTIONS)}, one for each "
                "slice of VGG16"
            )


class LPIPS(nn.Module):
    """The distance of two images each, weighted over the features of all slices.

    Nothing is random. The original trains with active dropout before the weighted sum,
    which LPIPS itself has only for fitting those weights.

    Source: arXiv:1801.03924; the reference's `LPIPS`.
    """

    cfg: LPIPSConfig = LPIPSConfig()

    def setup(self):
        c, ones = self.cfg, nn.initializers.ones
        he = named(nn.initializers.he_normal(), (None,) * 4)
        self.slices = [
            [convolution(width, (3, 3), c.dtype, init=he) for _ in range(count)]
            for width, count in zip(c.widths, CONVOLUTIONS, strict=True)
        ]
        self.heads = [
            self.param(f"head_{i}", named(ones, (None,)), (width,), jnp.float32)
            for i, width in enumerate(c.widths)
        ]

    def __call__(self, x: Images, y: Images) -> Float[jax.Array, "b"]:
        """
        Args:
            x, y: pixels in [-1, 1], at least 16 x 16 of them.

        Raises:
            ValueError: the images are smaller.
        """
        return jnp.stack(self.contributions(x, y)).sum(axis=0)

    def contributions(self, x: Images, y: Images) -> list[Float[jax.Array, "b"]]:
        """Each slice's part of the distance."""
        pairs = zip(self.heads, self.features(x), self.features(y), strict=True)
        return [distance(*pair) for pair in pairs]

    def features(self, x: Images) -> list[Float[jax.Array, "b _ _ _"]]:
        """The features of each slice, every one at half the size of the one before."""
        if min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels are too small for "
                f"LPIPS, which halves them four times; give at least {SMALLEST} x "
                f"{SMALLEST}, or the perceptual loss the weight 0"
            )
        shift, scale = (
            jnp.asarray(colours, jnp.float32)[None, None, None]
            for colours in (SHIFT, SCALE)
        )
        x, features = (x.astype(jnp.float32) - shift) / scale, []
        for i, layers in enumerate(self.slices):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            for layer in layers:
                x = nn.relu(layer(x))
            features.append(x)
        return features


def distance(
    weight: Float[jax.Array, "c"],
    x: Float[jax.Array, "b h w c"],
    y: Float[jax.Array, "b h w c"],
) -> Float[jax.Array, "b"]:
    """Weighted squared differences of unit feature vectors, means over the image."""
    difference = jnp.square(_unit(x) - _unit(y))
    return (difference * weight[None, None, None]).sum(axis=-1).mean(axis=(1, 2))


def initialise_lpips(cfg: LPIPSConfig, key: jax.Array) -> Any:
    """Fresh weights, in boxes that name their axes; only trained ones are of use."""
    image = jnp.zeros((1, SMALLEST, SMALLEST, 3), jnp.float32)
    return LPIPS(cfg).init(key, image, image)["params"]


def lpips_shapes(cfg: LPIPSConfig) -> Any:
    """Shapes of the weights, for their conversion."""
    return jax.eval_shape(partial(initialise_lpips, cfg), jax.random.key(0))


def _unit(x: Float[jax.Array, "b h w c"]) -> Float[jax.Array, "b h w c"]:
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    # The slope of the root is infinite at zero, that of its lower bound is zero.
    return x / (jnp.sqrt(jnp.maximum(square, TINY)) + EPS)
