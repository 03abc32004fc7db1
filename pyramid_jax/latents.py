# SPDX-License-Identifier: Apache-2.0
"""What a model calls a latent: its size for given pixels, its normalisation."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pyramid_jax.shapes import Array


@dataclass(frozen=True)
class LatentConfig:
    """The latent space of a model; by default the released VAE's with the SD3 DiT.

    Args:
        channels: values per latent cell.
        spatial, temporal: pixels per cell and side, frames per later latent frame.
        image_shift, image_scale: frame 0 (or an image) becomes (raw - shift) · scale.
        video_shift, video_scale: the same for the frames after the first.
    """

    channels: int = 16
    spatial: int = 8
    temporal: int = 8
    image_shift: float = 0.1490
    image_scale: float = 1 / 1.8415
    video_shift: float = -0.2343
    video_scale: float = 1 / 3.0986

    def frames(self, pixel_frames: int) -> int:
        """Latent frames of a video; ValueError where the numbers don't fit."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal:
            below = 1 + max(0, pixel_frames - 1) // self.temporal * self.temporal
            raise ValueError(
                f"{pixel_frames} frames are not 1 + a multiple of {self.temporal}; "
                f"use {below} or {below + self.temporal}"
            )
        return 1 + (pixel_frames - 1) // self.temporal

    def longest(self, pixel_frames: int) -> int:
        """The frames of the longest video that has at most so many."""
        return 1 + (pixel_frames - 1) // self.temporal * self.temporal

    def grid(self, height: int, width: int, patch: int, stages: int) -> tuple[int, int]:
        """Latent height and width; ValueError where a size does not fit the pyramid."""
        factors = (self.spatial, patch, 2 ** (stages - 1))
        unit = int(np.prod(factors))
        for name, size in (("height", height), ("width", width)):
            if size < unit or size % unit:
                below = max(unit, size // unit * unit)
                raise ValueError(
                    f"{name} {size} is not a multiple of {unit} = {factors[0]} (latent "
                    f"cell) x {factors[1]} (patch) x {factors[2]} (pyramid); "
                    f"use {below} or {below + unit}"
                )
        return height // self.spatial, width // self.spatial

    def normalise(
        self, raw: Float[Array, "*b t h w c"], begins: bool = True
    ) -> Float[Array, "*b t h w c"]:
        """Raw latents with about zero mean and unit deviation.

        Args:
            begins: frame 0 is the first of its video, with the statistics of images.
        """
        shift, scale = self._statistics(raw.shape, begins)
        return (raw - shift) * scale

    def denormalise(
        self, z: Float[Array, "*b t h w c"], begins: bool = True
    ) -> Float[Array, "*b t h w c"]:
        """The inverse of `normalise`."""
        shift, scale = self._statistics(z.shape, begins)
        return z / scale + shift

    def _statistics(
        self, shape: tuple[int, ...], begins: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale of every frame, of the rank of `shape`."""
        frames = shape[-4]
        first = [(self.image_shift, self.image_scale)] * begins
        later = [(self.video_shift, self.video_scale)] * (frames - begins)
        pairs = np.array(first + later, np.float32)
        shift, scale = pairs.T.reshape(2, *[1] * (len(shape) - 4), frames, 1, 1, 1)
        return shift, scale
