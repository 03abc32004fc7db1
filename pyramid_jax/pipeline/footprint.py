# SPDX-License-Identifier: Apache-2.0
"""What one compiled call of a network holds besides weights, inputs and its past.

Estimates in bytes: how many arrays of the largest size live at once. The factors are
those of XLA's compiler for an A100 (docs/memory.md); its compiler for CPUs keeps up to
twice as much.
"""

import jax.numpy as jnp

from pyramid_jax.kernels import attention
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.dit import DiTConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.text_encoder import TextConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.models.vae_layers import KERNEL, LOGITS

Shape = tuple[int, int, int, int]  # videos, frames, height, width

BLOCK = 10  # arrays of tokens times width inside a transformer's block
READER = 24  # the same in a text encoder, whose MLP is wider, in float32
# Frames that a convolution holds beside those it makes: of the beginning of a video,
# and of a piece that goes on from the past.
BEGINNING, LATER = 1, 3


def text(cfg: T5Config | CLIPConfig | TextConfig, rows: int, words: int) -> int:
    """Of a text encoder that reads rows of `words` tokens."""
    return 4 * rows * words * (READER * cfg.width + 3 * cfg.heads * words)


def transformer(cfg: DiTConfig, rows: int, tokens: int, words: int) -> int:
    """Of a `DiT` that reads rows of video and text tokens."""
    length, size = tokens + words, jnp.dtype(cfg.dtype).itemsize
    held = BLOCK * size * length * cfg.width
    if (cfg.attention or attention.default(length, cfg.head_dim, cfg.dtype)) == "xla":
        held += (4 + size) * cfg.heads * length**2
    return rows * held


def encoder(cfg: VAEConfig, shape: Shape) -> int:
    """Of the VAE's encoder, for pixels.

    A residual block holds its input, its norm, and its output.
    """
    videos, frames, height, width = shape
    area, before, most = height * width, cfg.encoder_widths[0], 0
    for after, space, time in zip(
        cfg.encoder_widths, cfg.spatial, cfg.temporal, strict=True
    ):
        most = max(most, (frames + BEGINNING) * area * (2 * before + after))
        area, before = area // (4 if space else 1), after
        frames = -(-frames // 2) if time else frames
    return _of_vae(cfg, videos * most, frames, area)


def decoder(cfg: VAEConfig, shape: Shape) -> int:
    """Of the VAE's decoder, for latents; and the pixels that it makes, twice."""
    videos, frames, height, width = shape
    cells = area = height * width
    before, most, made = cfg.decoder_widths[-1], 0, frames
    for after, space, time in zip(
        cfg.decoder_widths[::-1], cfg.spatial, cfg.temporal, strict=True
    ):
        most = max(most, (made + LATER) * area * (2 * before + after))
        area, before = area * (4 if space else 1), after
        made *= 2 if time else 1
    most = max(most, (made + LATER) * area * 3 * before)
    pixels = 2 * 4 * videos * made * area * cfg.pixels
    return _of_vae(cfg, videos * most, videos * frames, cells) + pixels


def past(cfg: VAEConfig) -> int:
    """What the decoder remembers of a video for each latent cell of a frame; exact.

    Every convolution keeps the last frames of its input.
    """
    area, before = 1, cfg.decoder_widths[-1]
    values = cfg.latent + 4 * before
    levels = (cfg.decoder_widths[::-1], cfg.decoder_layers, cfg.spatial, cfg.temporal)
    for after, layers, space, time in zip(*levels, strict=True):
        values += area * (before + (2 * layers - 1) * after)
        values += area * after if space else 0
        area, before = area * (4 if space else 1), after
        values += area * after if time else 0
    values += area * before
    return (KERNEL - 1) * values * jnp.dtype(cfg.dtype).itemsize


def _of_vae(cfg: VAEConfig, values: int, frames: int, cells: int) -> int:
    """Bytes of the values, or of the attention between all cells of a frame."""
    size = jnp.dtype(cfg.dtype).itemsize
    at_once = min(frames, max(1, LOGITS // cells**2))
    return max(size * values, (4 + size) * at_once * cells**2)
