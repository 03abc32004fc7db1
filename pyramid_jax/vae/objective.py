# SPDX-License-Identifier: Apache-2.0
"""The losses of the autoencoder, and of the discriminator that judges its videos.

They know no network, only functions of arrays:

    reconstruct(kernel) -> video     the decoder, as a function of its last kernel
    perceptual(x, y) -> distances    one per frame, both frames `b h w c`
    judge(video) -> logits           large where the video looks real

    out = autoencoder_loss(cfg, video, step, reconstruct=..., perceptual=..., ...)
    judged = discriminator_loss(cfg, judge, video, out.reconstruction, step)

`reconstruct` runs once: only the last convolution depends on the kernel, so that the
adaptive weight costs two products of that layer. The first loss has no gradient in the
weights of `perceptual` and `judge`, the second none in those of the autoencoder: one
gradient of `out.loss + judged.loss` serves both optimizers exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Int

from pyramid_jax.config import check_entries

DISCRIMINATORS, ADVERSARIAL_LOSSES = ("none", "2d", "3d"), ("hinge", "vanilla")
# parity: keep the adaptive weight finite where the judge has no slope.
SLOPE_FLOOR, WEIGHT_LIMIT = 1e-4, 1e4

Scalar = Float[jax.Array, ""]
Reconstruct = Callable[[jax.Array], jax.Array]
Perceptual = Callable[[jax.Array, jax.Array], jax.Array]
Judge = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The weights of the losses. The defaults are the original's first stage.

    Args:
        pixel, perceptual, kl, adversarial: weights of the four losses. With perceptual
            0 no LPIPS weights are needed. The adversarial loss is first scaled so that
            its slope in the last kernel is as large as that of pixel and perceptual.
        discriminator: judges single frames ("2d"), clips ("3d"), or there is "none".
        discriminator_start: the step from which the discriminator learns and counts.
        discriminator_factor: of both losses that the discriminator is in.
        adversarial_loss: of the discriminator, "hinge" or "vanilla" (logistic).
        log_variance: of the reconstruction error; its initial value if it is learned.
        learn_log_variance: the caller trains it and gives it to the loss.

    Raises:
        ValueError: a value is out of range.
    """

    pixel: float = 10.0
    perceptual: float = 1.0
    kl: float = 1e-12
    adversarial: float = 0.5
    discriminator: str = "none"
    discriminator_start: int = 250_000
    discriminator_factor: float = 1.0
    adversarial_loss: str = "hinge"
    log_variance: float = 0.0
    learn_log_variance: bool = False

    def __post_init__(self):
        names = ("pixel", "perceptual", "kl", "adversarial")
        names += ("discriminator_start", "discriminator_factor")
        check_entries(self, lambda x: x >= 0, "0 or more", *names)
        kinds, losses = f"one of {DISCRIMINATORS}", f"one of {ADVERSARIAL_LOSSES}"
        check_entries(self, DISCRIMINATORS.__contains__, kinds, "discriminator")
        check_entries(self, ADVERSARIAL_LOSSES.__contains__, losses, "adversarial_loss")


class VAELosses(NamedTuple):
    """The parts of the autoencoder's loss: means over the batch, not yet weighted.

    `nll` holds pixels and perception with their weights; `adversarial_weight` is the
    adaptive one, zero before the discriminator starts.
    """

    nll: Float[jax.Array, ""]
    pixel: Float[jax.Array, ""]
    perceptual: Float[jax.Array, ""]
    kl: Float[jax.Array, ""]
    adversarial: Float[jax.Array, ""]
    adversarial_weight: Float[jax.Array, ""]
    log_variance: Float[jax.Array, ""]


class Reconstructed(NamedTuple):
    """The autoencoder's loss, its parts, and the reconstruction that it judges."""

    loss: Float[jax.Array, ""]
    parts: VAELosses
    reconstruction: Float[jax.Array, "b f h w c"]


class Judged(NamedTuple):
    """The discriminator's loss, and its mean logits of videos, real and fake."""

    loss: Float[jax.Array, ""]
    real: Float[jax.Array, ""]
    fake: Float[jax.Array, ""]


def autoencoder_loss(
    cfg: ObjectiveConfig,
    video: Float[jax.Array, "b f h w c"],
    step: int | Int[jax.Array, ""],
    *,
    reconstruct: Reconstruct,
    kernel: Float[jax.Array, "*_"],
    kl: Float[jax.Array, "b _"],
    perceptual: Perceptual | None = None,
    judge: Judge | None = None,
    log_variance: Float[jax.Array, ""] | None = None,
) -> Reconstructed:
    """The loss of the autoencoder on a batch of videos, pixels in [-1, 1].

        error = mean over frames of pixel·mean (x - y)² + perceptual·LPIPS(x, y)
        nll   = error / exp(log_variance) + log_variance
        loss  = nll + kl·mean KL + factor·w·g,   g = -mean judge(y), from the start on
        w     = adversarial·clip(|∂nll/∂k| / (|∂g/∂k| + 1e-4), 0, 1e4)

    with k the decoder's last kernel. w is a constant for the gradient.

    Args:
        reconstruct: the decoder on the latents of the batch.
        kernel: of the decoder's last convolution.
        kl: the posterior's divergence per channel, summed over positions.
        perceptual, judge: needed where their weights are not zero.
        log_variance: of the error, if it is learned.

    Raises:
        ValueError: a function is missing whose weight is not zero.

    Source: paper, appendix on the VAE; the reference's `LPIPSWithDiscriminator`.
    """
    _check(cfg, perceptual=perceptual, judge=judge, log_variance=log_variance)
    reconstruction, pull = jax.vjp(reconstruct, kernel)
    frozen = jax.lax.stop_gradient(reconstruction)

    error_of = partial(_error, cfg, perceptual, video)
    error_and_slope = jax.value_and_grad(error_of, has_aux=True)
    (error, (pixel, distance)), slope = error_and_slope(frozen)
    log_scale = jnp.float32(cfg.log_variance) if log_variance is None else log_variance
    scale = jnp.exp(log_scale)
    nll = _linear(error, slope, reconstruction) / scale + log_scale
    mean_kl = kl.astype(jnp.float32).mean()
    loss = nll + cfg.kl * mean_kl

    weight, adversarial = jnp.float32(0), jnp.float32(0)
    if cfg.discriminator != "none" and judge is not None:
        # perf: before it starts, the discriminator costs nothing.
        g, g_slope, ratio = jax.lax.cond(
            step >= cfg.discriminator_start,
            partial(_judgement, judge, pull, slope, frozen),
            lambda: (jnp.float32(0), jnp.zeros_like(frozen), jnp.float32(0)),
        )
        share = cfg.adversarial if cfg.discriminator_factor else 0.0
        weight = share * jnp.clip(ratio / scale, 0, WEIGHT_LIMIT)
        adversarial = _linear(g, g_slope, reconstruction)
        factor = cfg.discriminator_factor * jax.lax.stop_gradient(weight)
        loss = loss + factor * adversarial
    losses = VAELosses(nll, pixel, distance, mean_kl, adversarial, weight, log_scale)
    return Reconstructed(loss, jax.lax.stop_gradient(losses), reconstruction)


def discriminator_loss(
    cfg: ObjectiveConfig,
    judge: Judge,
    real: Float[jax.Array, "b f h w c"],
    fake: Float[jax.Array, "b f h w c"],
    step: int | Int[jax.Array, ""],
) -> Judged:
    """The loss of the discriminator on videos and their reconstructions, times factor.

        hinge:   (mean relu(1 - judge(real)) + mean relu(1 + judge(fake))) / 2
        vanilla: (mean softplus(-judge(real)) + mean softplus(judge(fake))) / 2

    Zero, as its gradient, before the start.

    Source: the reference's `LPIPSWithDiscriminator`.
    """
    at_real = judge(real).astype(jnp.float32)
    at_fake = judge(jax.lax.stop_gradient(fake)).astype(jnp.float32)
    if cfg.adversarial_loss == "hinge":
        loss = jax.nn.relu(1 - at_real).mean() + jax.nn.relu(1 + at_fake).mean()
    else:
        loss = jax.nn.softplus(-at_real).mean() + jax.nn.softplus(at_fake).mean()
    begun = jnp.asarray(step >= cfg.discriminator_start, jnp.float32)
    loss = begun * cfg.discriminator_factor * loss / 2
    return Judged(loss, at_real.mean(), at_fake.mean())


def _check(cfg: ObjectiveConfig, **critics: Any) -> None:
    needed = {
        "perceptual": cfg.perceptual > 0,
        "judge": cfg.discriminator != "none",
        "log_variance": cfg.learn_log_variance,
    }
    if absent := [x for x in needed if needed[x] and critics[x] is None]:
        raise ValueError(
            f"the objective needs {absent} among its critics; give them, or switch "
            "them off in its config (perceptual 0, discriminator 'none', "
            "learn_log_variance False)"
        )


def _error(
    cfg: ObjectiveConfig,
    perceptual: Perceptual | None,
    video: Float[jax.Array, "b f h w c"],
    reconstruction: Float[jax.Array, "b f h w c"],
) -> tuple[Scalar, tuple[Scalar, Scalar]]:
    """The weighted error, and its two parts, means over all frames."""
    x, y = video.astype(jnp.float32), reconstruction.astype(jnp.float32)
    pixel, distance = jnp.square(x - y).mean(), jnp.float32(0)
    if cfg.perceptual > 0 and perceptual is not None:
        frames = [rearrange(v, "b f h w c -> (b f) h w c") for v in (x, y)]
        distance = perceptual(*frames).astype(jnp.float32).mean()
    return cfg.pixel * pixel + cfg.perceptual * distance, (pixel, distance)


def _judgement(
    judge: Judge,
    pull: Callable[[jax.Array], tuple[jax.Array]],
    error_slope: jax.Array,
    reconstruction: Float[jax.Array, "b f h w c"],
) -> tuple[Scalar, jax.Array, Scalar]:
    """The adversarial loss, its slope in the reconstruction, and the adaptive ratio:
    the error's slope in the last kernel over that of the adversarial loss."""

    def looks_fake(video: jax.Array) -> Scalar:
        return -judge(video).astype(jnp.float32).mean()

    g, slope = jax.value_and_grad(looks_fake)(reconstruction)
    return g, slope, _norm(pull(error_slope)) / (_norm(pull(slope)) + SLOPE_FLOOR)


def _linear(value: Scalar, slope: jax.Array, x: jax.Array) -> Scalar:
    """`value`, as a function of x alone, whose derivative there is `slope`.

    The slopes are needed for the adaptive weight anyway; so the backward pass does not
    run through the critics again, nor reach their weights.
    """
    value, slope, at = jax.lax.stop_gradient((value, slope, x))
    step = x.astype(jnp.float32) - at.astype(jnp.float32)
    return value + (slope.astype(jnp.float32) * step).sum()


def _norm(slopes: tuple[jax.Array]) -> Scalar:
    (slope,) = slopes
    return jnp.sqrt(jnp.square(slope.astype(jnp.float32)).sum())
