# SPDX-License-Identifier: Apache-2.0
"""What a model calls a latent: its size for some pixels, and its normalisation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pyramid_jax.shapes import Array

# Pixels "b f h w 3" of 8 bits and numbers, which decide the noise -> raw latents.
RawEncoder = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LatentConfig:
    """The latent space of a model; by default the released VAE's with the SD3 DiT.

    Args:
        channels: values per latent cell.
        spatial, temporal: pixels per cell and side, frames per later latent frame.
        image_shift, image_scale: frame 0 (or an image) becomes (raw - shift) · scale.
        video_shift, video_scale: the same for the frames after the first.

    Raises:
        ValueError: a size below 1.
    """

    channels: int = 16
    spatial: int = 8
    temporal: int = 8
    image_shift: float = 0.1490
    image_scale: float = 1 / 1.8415
    video_shift: float = -0.2343
    video_scale: float = 1 / 3.0986

    def __post_init__(self):
        for name in ("channels", "spatial", "temporal"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")

    def frames(self, pixel_frames: int, begins: bool = True) -> int:
        """Latent frames of a video, or of a later part of one.

        Args:
            begins: the first frame, a latent frame of its own, is among them.

        Raises:
            ValueError: they are no multiple of `temporal` (+ 1 where a video begins).
        """
        first = int(begins)
        what = f"{pixel_frames} frames are"
        _check_multiple(what, pixel_frames, self.temporal, first)
        return first + (pixel_frames - first) // self.temporal

    def longest(self, pixel_frames: int) -> int:
        """The frames of the longest video with at most `pixel_frames` that fits."""
        return 1 + (pixel_frames - 1) // self.temporal * self.temporal

    def grid(
        self, height: int, width: int, patch: int = 1, stages: int = 1
    ) -> tuple[int, int]:
        """Latent height and width of pictures.

        Args:
            patch: side of the model's patches in latent cells.
            stages: resolutions of the pyramid, each half of the next one.

        Raises:
            ValueError: a size does not fit latent cells, patches and pyramid.
        """
        coarsest = 2 ** (stages - 1)
        unit = self.spatial * patch * coarsest
        factors = (
            f"{self.spatial} (latent cell) x {patch} (patch) x {coarsest} (pyramid)"
        )
        reason = f" = {factors}" if patch * coarsest > 1 else ""
        for name, size in (("height", height), ("width", width)):
            _check_multiple(f"{name} {size} is", size, unit, reason=reason)
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


def _check_multiple(
    what: str, size: int, unit: int, first: int = 0, reason: str = ""
) -> None:
    """Raises ValueError unless a positive size is `first` + a multiple of `unit`."""
    least = first or unit
    if size < least or (size - first) % unit:
        below = max(least, first + (size - first) // unit * unit)
        expected = f"{first} + a multiple" if first else "a multiple"
        raise ValueError(
            f"{what} not {expected} of {unit}{reason}; use {below} or {below + unit}"
        )
