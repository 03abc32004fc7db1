# SPDX-License-Identifier: Apache-2.0
"""How data workers get latents: normalised pixels, or what a VAE made and stored."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pyramid_jax.data.examples import HeightWidth, Pixels
from pyramid_jax.data.loader import DataConfig
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.precompute import read_latent
from pyramid_jax.data.video_io import to_model
from pyramid_jax.latents import LatentConfig


@dataclass(frozen=True)
class PixelLatents:
    """Loads the latents of a pixel-space model: its normalised pixels."""

    pixels: Pixels
    latent: LatentConfig

    def __call__(
        self, record: Record, size: HeightWidth
    ) -> Float[np.ndarray, "t h w 3"]:
        return self.latent.normalise(to_model(self.pixels(record, size)))


@dataclass(frozen=True)
class StoredLatents:
    """Loads the latents that `data.precompute` stored, and normalises them.

    Longer ones are cut to `frames` latent frames.
    """

    latent: LatentConfig
    frames: int

    def __call__(
        self, record: Record, size: HeightWidth
    ) -> Float[np.ndarray, "t h w c"]:
        if record.latent is None:
            raise ValueError(
                "has no latent in the manifest; make latents with "
                "python -m launch.prepare --latents"
            )
        raw = read_latent(record.latent)
        frames = self.frames if record.kind == "video" else 1
        cells = (side // self.latent.spatial for side in size)
        expected = (frames, *cells, self.latent.channels)
        if len(raw) < frames or raw.shape[1:] != expected[1:]:
            raise ValueError(
                f"{record.latent} has shape {raw.shape}, expected {expected}; prepare "
                "latents of the size and frames of this run"
            )
        return self.latent.normalise(raw[:frames])


def latent_loader(
    latent: LatentConfig, data: DataConfig
) -> PixelLatents | StoredLatents:
    """How the data workers get latents: from pixels, or stored if a VAE made them."""
    if (latent.spatial, latent.temporal, latent.channels) == (1, 1, 3):
        return PixelLatents(Pixels(data.frames, data.fps), latent)
    return StoredLatents(latent, latent.frames(data.frames))
