# SPDX-License-Identifier: Apache-2.0
"""A network that tells videos from reconstructions, patch by patch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax.models.layers import convolution, layer_norm
from pyramid_jax.sharding import named

KINDS = ("2d", "3d")
KERNEL, SLOPE, EPS = 4, 0.2, 1e-5
# Channels grow with the layers up to so many times the first width.
GROWTH = 8


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Kind and sizes of a discriminator.

    Args:
        kind: "2d" judges every frame alone, "3d" clips.
        pixels: channels of pixels.
        width: channels of the first layer.
        layers: that halve height and width; the first of a "3d" halves frames too.
        dtype: of the convolutions; weights, norms and logits are float32.

    Raises:
        ValueError: another kind, or no layers.
    """

    kind: str = "2d"
    pixels: int = 3
    width: int = 64
    layers: int = 4
    dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"discriminator kind {self.kind!r} must be one of {KINDS}")
        if self.layers < 1:
            raise ValueError(f"discriminator layers {self.layers} must be at least 1")

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """The strides of every convolution over frames (in "3d"), rows and columns."""
        strides = [(2, 2, 2), *[(1, 2, 2)] * (self.layers - 1), *[(1, 1, 1)] * 2]
        return strides if self.kind == "3d" else [stride[1:] for stride in strides]

    @property
    def smallest(self) -> tuple[int, int, int]:
        """The fewest frames, rows and columns that give a logit."""
        side = 3 * 2**self.layers
        return (2 * (self.layers + 2) if self.kind == "3d" else 1, side, side)


class Discriminator(nn.Module):
    """Logits of overlapping patches of a video, large where it looks real.

    Source: the reference's `NLayerDiscriminator` and `NLayerDiscriminator3D`.
    """

    cfg: DiscriminatorConfig

    @nn.compact
    def __call__(
        self, video: Float[jax.Array, "b f h w c"]
    ) -> Float[jax.Array, "b _ _ _"]:
        """
        Args:
            video: pixels in [-1, 1].

        Raises:
            ValueError: the video is smaller than `cfg.smallest`.
        """
        c = self.cfg
        _check(c, video.shape)
        x = video if c.kind == "3d" else rearrange(video, "b f h w c -> (b f) h w c")
        rank, last = len(c.strides[0]), len(c.strides) - 1
        axes = (*[None] * rank, "embed", None)
        init = named(nn.initializers.normal(0.02), axes)
        layer = partial(convolution, kernel=(KERNEL,) * rank, dtype=c.dtype, init=init)
        for i, strides in enumerate(c.strides):
            width = 1 if i == last else c.width * min(2**i, GROWTH)
            x = layer(width, strides=strides, name=f"layer_{i}")(x)
            if 0 < i < last:
                # Each channel of each example alone.
                x = layer_norm(x, EPS, tuple(range(1, rank + 1))).astype(x.dtype)
            if i < last:
                x = nn.leaky_relu(x, SLOPE)
        x = x.astype(jnp.float32).squeeze(-1)
        return (
            x if c.kind == "3d" else rearrange(x, "(b f) y x -> b f y x", b=len(video))
        )


def initialise_discriminator(cfg: DiscriminatorConfig, key: jax.Array) -> Any:
    """Fresh weights, in boxes that name their axes."""
    video = jnp.zeros((1, *cfg.smallest, cfg.pixels), jnp.float32)
    return Discriminator(cfg).init(key, video)["params"]


def _check(cfg: DiscriminatorConfig, shape: tuple[int, ...]) -> None:
    _, *sizes, channels = shape
    if channels != cfg.pixels:
        raise ValueError(
            f"pixels have {channels} channels, this discriminator takes {cfg.pixels}"
        )
    fixes = {
        "frames": "a '2d' one, which takes images",
        "rows": "fewer layers",
        "columns": "fewer layers",
    }
    for name, size, least in zip(fixes, sizes, cfg.smallest, strict=True):
        if size < least:
            raise ValueError(
                f"{size} {name} are too few for a {cfg.kind} discriminator of "
                f"{cfg.layers} layers; give at least {least}, or {fixes[name]}"
            )
