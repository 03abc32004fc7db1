# SPDX-License-Identifier: Apache-2.0
"""The networks of VAE training, their one loss and their optimizers.

The weights are {"vae": ..., "discriminator": ..., "perceptual": ...}, the last two
where they are needed. Autoencoder and discriminator learn from the same reconstruction:
the losses of `vae_objective` stop each other's gradients, so their sum has one gradient
that is right for both, and labels tell the two optimizers which weights are theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, UInt8

from pyramid_jax import sharding
from pyramid_jax.data.video_io import to_model
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.models import discriminator, vae
from pyramid_jax.models.discriminator import Discriminator, DiscriminatorConfig
from pyramid_jax.models.lpips import LPIPS, SMALLEST, LPIPSConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.training.metrics import Means
from pyramid_jax.training.optimizer import OptimizerConfig, optimizer
from pyramid_jax.vae import codec
from pyramid_jax.vae import objective as vae_objective
from pyramid_jax.vae.clips import Footage
from pyramid_jax.vae.objective import Critics, Decoded, ObjectiveConfig


@dataclass(frozen=True)
class VAENetworks:
    """What is trained, and how.

    Args:
        discriminator, lpips: used if the objective gives them a weight.
        image_share: weight of the pictures in the loss, where a batch has any.
        freeze_encoder: train the decoder alone.

    Raises:
        ValueError: a value is out of range, or the discriminator's kind is not the
            objective's.
    """

    vae: VAEConfig
    objective: ObjectiveConfig
    discriminator: DiscriminatorConfig
    lpips: LPIPSConfig
    image_share: float = 0.1
    freeze_encoder: bool = False

    def __post_init__(self):
        if not 0 <= self.image_share < 1:
            raise ValueError(f"image_share {self.image_share} must lie in [0, 1)")
        if self.judged and self.discriminator.kind != self.objective.discriminator:
            raise ValueError(
                f"the objective asks for a {self.objective.discriminator!r} "
                f"discriminator, this one is {self.discriminator.kind!r}; use one kind"
            )

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return self.objective.discriminator != "none"

    @property
    def perceived(self) -> bool:
        """Whether there is a perceptual loss."""
        return self.objective.perceptual > 0


def initialise(networks: VAENetworks, key: jax.Array) -> Any:
    """Fresh weights in boxes that name their axes; LPIPS needs its own instead."""
    first, second, third = jax.random.split(key, 3)
    params = {"vae": vae.initialise(networks.vae, first)}
    if networks.judged:
        params["discriminator"] = discriminator.initialise(
            networks.discriminator, second
        )
    if networks.perceived:
        image = jnp.zeros((1, SMALLEST, SMALLEST, 3))
        params["perceptual"] = LPIPS(networks.lpips).init(third, image, image)["params"]
    return params


def optimizers(
    networks: VAENetworks, autoencoder: OptimizerConfig, judge: OptimizerConfig
) -> optax.GradientTransformation:
    """One optimizer each for autoencoder and discriminator, with a norm to clip of its
    own; LPIPS, and an encoder that is frozen, do not change."""
    labels: dict[str, Any] = {"vae": "autoencoder"}
    if networks.freeze_encoder:
        labels["vae"] = {"encoder": "frozen", "decoder": "autoencoder"}
    if networks.judged:
        labels["discriminator"] = "discriminator"
    if networks.perceived:
        labels["perceptual"] = "frozen"
    transforms: dict[Any, optax.GradientTransformation] = {
        "autoencoder": optimizer(autoencoder),
        "discriminator": optimizer(judge),
        "frozen": optax.set_to_zero(),
    }
    return optax.multi_transform(transforms, labels)


def loss(
    networks: VAENetworks,
    params: Any,
    batch: Footage,
    key: jax.Array,
    step: jax.Array,
) -> tuple[Float[jax.Array, ""], Means]:
    """The sum of both losses of a batch, and its parts for the metrics."""
    value, found = footage_loss(networks, params, batch.video, key, step)
    if batch.image is not None:
        alone = networks
        if networks.objective.discriminator == "3d":  # which can not judge one frame
            alone = replace(
                networks, objective=replace(networks.objective, discriminator="none")
            )
        of_images, parts = footage_loss(
            alone, params, batch.image, jax.random.fold_in(key, 1), step
        )
        share = networks.image_share
        value = (1 - share) * value + share * of_images
        found |= {f"image_{name}": part for name, part in parts.items()}
    return value, Means(found, dict.fromkeys(found, jnp.float32(1)))


def footage_loss(
    networks: VAENetworks,
    params: Any,
    pixels: UInt8[jax.Array, "b f h w 3"],
    key: jax.Array,
    step: jax.Array,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """The sum of both losses of some clips of one length, and its parts by name."""
    cfg, weights = networks.objective, params["vae"]
    video = to_model(pixels)
    encoder = weights["encoder"]
    if networks.freeze_encoder:
        encoder = jax.lax.stop_gradient(encoder)
    raw = whole(vae.encode, networks.vae, {"encoder": encoder}, video)
    moments = vae.moments(raw)
    latents = moments.sample(jax.random.normal(key, moments.mean.shape))

    def reconstruct(kernel: jax.Array) -> jax.Array:
        decoder = with_last_kernel(weights["decoder"], kernel)
        return whole(vae.decode, networks.vae, {"decoder": decoder}, latents)

    decoded = Decoded(reconstruct, last_kernel(weights["decoder"]), moments.kl())
    judging = critics(networks, params)
    out = vae_objective.autoencoder_loss(cfg, video, decoded, judging, step)
    parts = out.parts
    found = {"loss_pixel": parts.pixel, "kl": parts.kl}
    if networks.perceived:
        found["loss_perceptual"] = parts.perceptual
    if judging.judge is None:
        return out.loss, found
    judged = vae_objective.discriminator_loss(
        cfg, judging.judge, video, out.reconstruction, step
    )
    found |= {
        "adversarial": parts.adversarial,
        "adversarial_weight": parts.adversarial_weight,
        "loss_discriminator": judged.loss,
        "logit_real": judged.real,
        "logit_fake": judged.fake,
    }
    return out.loss + judged.loss, found


def whole(
    f: Callable[..., Any], cfg: VAEConfig, params: Any, x: Float[jax.Array, "b f h w c"]
) -> Float[jax.Array, "b _ _ _ _"]:
    """`vae.encode` or `vae.decode` of whole videos.

    Where the mesh divides frames, its devices share each video: the first frame is on
    all of them, and gradients cross the borders between them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or sharding.parts("frames", mesh) == 1:
        return f(cfg, params, x)[0]

    def make(halo: Halo) -> codec.Step:
        return lambda part, past: f(cfg, params, part, past, halo)

    factors = (cfg.temporal_factor, cfg.spatial_factor)
    step = codec.sharded(make, mesh, factors if f is vae.encode else (1, 1))
    first, past = step(x[:, :1], None)
    if x.shape[1] == 1:
        return first
    return jnp.concatenate([first, step(x[:, 1:], past)[0]], axis=1)


def critics(networks: VAENetworks, params: Any) -> Critics:
    """The functions that the objective needs."""
    perceptual: Any = None
    judge: Any = None
    if networks.perceived:
        weights = {"params": params["perceptual"]}
        perceptual = partial(LPIPS(networks.lpips).apply, weights)
    if networks.judged:
        weights = {"params": params["discriminator"]}
        judge = partial(Discriminator(networks.discriminator).apply, weights)
    return Critics(perceptual, judge)


def last_kernel(decoder: Mapping[str, Any]) -> jax.Array:
    """The kernel of a decoder's last convolution."""
    return decoder["head"]["convolution"]["kernel"]


def with_last_kernel(decoder: Mapping[str, Any], kernel: jax.Array) -> dict[str, Any]:
    """The decoder's weights with another last kernel."""
    head = decoder["head"]
    convolution = {**head["convolution"], "kernel": kernel}
    return {**decoder, "head": {**head, "convolution": convolution}}
