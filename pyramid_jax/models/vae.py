# SPDX-License-Identifier: Apache-2.0
"""The causal video VAE: pixels to the moments of latents, and latents to pixels.

Convolutions see their own frame and the two before it, norms and attention one frame.
A network is a function (x, past) -> (y, past): the past holds the few frames of every
layer that the next call needs, None begins a video. A whole clip, chunks of it and
single latent frames are therefore one piece of code, and give the same numbers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax.kernels.halo import Halo
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae_layers as layers
from pyramid_jax.models.vae_layers import Activations, Past
from pyramid_jax.sharding import named

DTYPES = ("float32", "bfloat16")
ALONE = Halo()
# Log-variance of the latents of a new encoder: noise must not drown their means.
NARROW = -8.0


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; by default those of the released one.

    Args:
        pixels, latent: channels of pixels and of latents.
        encoder_widths, decoder_widths: channels of the levels, finest first.
        encoder_layers, decoder_layers: residual blocks of each level, in the order in
            which a network runs them (the decoder begins with the coarsest).
        spatial, temporal: whether the encoder halves, and the decoder doubles, rows and
            columns (frames) after its first, second, ... level.
        groups: of channels that are normalised together.
        dtype: of convolutions and of what flows between layers; weights are float32.
        remat: the backward pass recomputes each block instead of storing its inside.
    """

    pixels: int = 3
    latent: int = 16
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 2)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3)
    spatial: tuple[bool, ...] = (True, True, True, False)
    temporal: tuple[bool, ...] = (True, True, True, False)
    groups: int = 32
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        lists = ("encoder_widths", "encoder_layers", "decoder_widths", "decoder_layers")
        names = (*lists, "spatial", "temporal")
        levels = {name: len(getattr(self, name)) for name in names}
        if len(set(levels.values())) > 1 or not self.spatial:
            raise ValueError(
                f"the VAE's fields describe different numbers of levels: {levels}; "
                "give every one as many entries as there are levels"
            )
        widths = (*self.encoder_widths, *self.decoder_widths)
        if odd := [width for width in widths if width % self.groups]:
            raise ValueError(
                f"VAE widths {odd} are not multiples of groups {self.groups}; change "
                "the widths, or groups to a divisor of all widths"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"VAE dtype {self.dtype!r} is unknown; use one of {DTYPES}"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** sum(self.spatial)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal)

    @property
    def latents(self) -> LatentConfig:
        """The sizes of latents; their statistics are not known here."""
        return LatentConfig(self.latent, self.spatial_factor, self.temporal_factor)

    def frames(self, latents: int) -> int:
        """The pixel frames of a video of so many latent frames."""
        return 1 + (latents - 1) * self.temporal_factor


class Moments(NamedTuple):
    """The posterior: a normal distribution of every latent value."""

    mean: Float[jax.Array, "b t h w c"]
    log_variance: Float[jax.Array, "b t h w c"]

    @property
    def deviation(self) -> Float[jax.Array, "b t h w c"]:
        """Standard deviations."""
        return jnp.exp(self.log_variance / 2)

    def sample(
        self, noise: Float[jax.Array, "b t h w c"]
    ) -> Float[jax.Array, "b t h w c"]:
        """Latents drawn with standard normal noise."""
        return self.mean + self.deviation * noise

    def kl(self) -> Float[jax.Array, "b c"]:
        """The divergence from standard normal noise, summed over frames and cells."""
        variance = jnp.exp(self.log_variance)
        excess = self.mean**2 + variance - 1 - self.log_variance
        return 0.5 * excess.sum(axis=(1, 2, 3))


def moments(raw: Float[jax.Array, "b t h w _"]) -> Moments:
    """Means and log-variances, the latter in [-30, 20], from the encoder's output."""
    mean, log_variance = jnp.split(raw, 2, axis=-1)
    return Moments(mean, log_variance.clip(-30.0, 20.0))


def initialise_vae(cfg: VAEConfig, key: jax.Array) -> Any:
    """Fresh weights of encoder and decoder, in boxes that name their axes."""
    side = cfg.spatial_factor
    pixels = jnp.zeros((1, 1, side, side, cfg.pixels), jnp.float32)
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent), jnp.float32)
    first, second = jax.random.split(key)
    return {
        "encoder": Encoder(cfg).init(first, pixels)["params"],
        "decoder": Decoder(cfg).init(second, latents)["params"],
    }


def encode(
    cfg: VAEConfig,
    params: Any,
    pixels: Float[jax.Array, "b f h w pixels"],
    past: Past = None,
    halo: Halo = ALONE,
) -> tuple[Float[jax.Array, "b t _ _ moments"], Past]:
    """Raw moments (see `moments`) of the latents of some frames, and the next past.

    Args:
        pixels: in [-1, 1]; 1 + a multiple of the temporal factor at the start of a
            video, a multiple of it later.
        past: what the call for the frames before returned; None: a video begins.
        halo: inside `jax.shard_map`, how devices share the video.

    Raises:
        ValueError: frames, height, width or channels that don't fit the config.
    """
    _, frames, height, width, channels = pixels.shape
    if channels != cfg.pixels:
        raise ValueError(
            f"pixels have {channels} channels, this VAE takes {cfg.pixels}; "
            "channels are the last axis"
        )
    cfg.latents.grid(height, width)
    cfg.latents.frames(frames, begins=past is None)
    moments: Any = Encoder(cfg, halo).apply({"params": params["encoder"]}, pixels, past)
    return moments


def decode(
    cfg: VAEConfig,
    params: Any,
    latents: Float[jax.Array, "b t h w c"],
    past: Past = None,
    halo: Halo = ALONE,
) -> tuple[Float[jax.Array, "b f _ _ pixels"], Past]:
    """Pixels, about -1 to 1 and not clamped, of some latent frames, and the next past.

    The first latent frame of a video becomes one frame, each later one as many as the
    temporal factor. Arguments as in `encode`.

    Raises:
        ValueError: another number of channels than the config's.
    """
    if latents.shape[-1] != cfg.latent or not latents.shape[1]:
        raise ValueError(
            f"latents {latents.shape} must be (batch, frames, height, width, "
            f"{cfg.latent}) with at least one frame; this VAE has {cfg.latent} channels"
        )
    pixels: Any = Decoder(cfg, halo).apply({"params": params["decoder"]}, latents, past)
    return pixels


class Encoder(nn.Module):
    """Pixels `b f h w 3` to raw moments `b t h w 2c` in float32, and the next past."""

    cfg: VAEConfig
    halo: Halo = ALONE

    def setup(self):
        c = self.cfg
        s = layers.Setting(c.groups, c.dtype, c.remat, self.halo)
        widths, narrow = c.encoder_widths, named(_narrow, (None,))
        self.entry = layers.Convolution(s, widths[0])
        levels = zip(widths, c.encoder_layers, c.spatial, c.temporal, strict=True)
        self.levels = [layers.Level(s, False, *level) for level in levels]
        self.middle = layers.Middle(s, widths[-1])
        self.head = layers.Activated(s, 2 * c.latent)
        self.mix = layers.linear(2 * c.latent, s).copy(bias_init=narrow)

    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        parts = (self.entry, *self.levels, self.middle, self.head)
        x, past = layers.chain(parts, x, past)
        return self.mix(x).astype(jnp.float32), past


class Decoder(nn.Module):
    """Latents `b t h w c` to pixels `b f h w 3` in float32, and the next past."""

    cfg: VAEConfig
    halo: Halo = ALONE

    def setup(self):
        c = self.cfg
        s = layers.Setting(c.groups, c.dtype, c.remat, self.halo)
        widths = c.decoder_widths[::-1]
        self.mix = layers.linear(c.latent, s)
        self.entry = layers.Convolution(s, widths[0])
        self.middle = layers.Middle(s, widths[0])
        levels = zip(widths, c.decoder_layers, c.spatial, c.temporal, strict=True)
        self.levels = [layers.Level(s, True, *level) for level in levels]
        self.head = layers.Activated(s, c.pixels)

    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        parts = (self.entry, self.middle, *self.levels, self.head)
        x, past = layers.chain(parts, self.mix(x), past)
        return x.astype(jnp.float32), past


def _narrow(key: jax.Array, shape: tuple[int], dtype: Any) -> jax.Array:
    """The bias of means and log-variances."""
    latent = shape[0] // 2
    return jnp.repeat(jnp.array([0.0, NARROW], dtype), latent)
