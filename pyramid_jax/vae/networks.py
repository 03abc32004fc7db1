# SPDX-License-Identifier: Apache-2.0
"""The networks of VAE training, their one loss and their optimizers.

The weights are {"vae": ..., "discriminator": ..., "perceptual": ...}, the last two
where they are needed. Autoencoder and discriminator learn from the same reconstruction:
the losses of `vae.objective` stop each other's gradients, so their sum has one gradient
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
from pyramid_jax.config import check_entries
from pyramid_jax.data.pixels import to_model
from pyramid_jax.models import discriminator, vae
from pyramid_jax.models.discriminator import Discriminator, DiscriminatorConfig
from pyramid_jax.models.lpips import LPIPS, LPIPSConfig, initialise_lpips
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.training.metrics import Means
from pyramid_jax.training.optimizer import OptimizerConfig, optimizer
from pyramid_jax.vae import objective as vae_objective
from pyramid_jax.vae.clips import Footage
from pyramid_jax.vae.codec import chunked, vae_step
from pyramid_jax.vae.objective import ObjectiveConfig


@dataclass(frozen=True)
class VAENetworks:
    """The networks of a training run, and the objective that trains them.

    Args:
        discriminator, lpips: used if the objective gives them a weight.
        image_share: weight of the images in the loss, where a batch has any.
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
        check_entries(self, lambda x: 0 <= x < 1, "in [0, 1)", "image_share")
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


def initialise_networks(networks: VAENetworks, key: jax.Array) -> Any:
    """Fresh weights in boxes that name their axes; LPIPS needs pretrained ones."""
    first, second, third = jax.random.split(key, 3)
    params = {"vae": vae.initialise_vae(networks.vae, first)}
    if networks.judged:
        params["discriminator"] = discriminator.initialise_discriminator(
            networks.discriminator, second
        )
    if networks.perceived:
        params["perceptual"] = initialise_lpips(networks.lpips, third)
    return params


def optimizers(
    networks: VAENetworks, autoencoder: OptimizerConfig, judge: OptimizerConfig
) -> optax.GradientTransformation:
    """Separate optimizers for autoencoder and discriminator, in one transformation.

    Each clips by the norm of its own gradient; LPIPS and a frozen encoder don't change.
    """
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


def vae_loss(
    networks: VAENetworks,
    params: Any,
    batch: Footage,
    key: jax.Array,
    step: jax.Array,
) -> tuple[Float[jax.Array, ""], Means]:
    """The sum of both losses of a batch, and its parts for the metrics."""
    loss, parts = footage_loss(networks, params, batch.video, key, step)
    if batch.image is not None:
        objective = networks.objective
        if objective.discriminator == "3d":  # which cannot judge one frame
            objective = replace(objective, discriminator="none")
        images, key = replace(networks, objective=objective), jax.random.fold_in(key, 1)
        image_loss, image_parts = footage_loss(images, params, batch.image, key, step)
        share = networks.image_share
        loss = (1 - share) * loss + share * image_loss
        parts |= {f"image_{name}": part for name, part in image_parts.items()}
    return loss, Means(parts, jnp.float32(1))


def footage_loss(
    networks: VAENetworks,
    params: Any,
    pixels: UInt8[jax.Array, "b f h w 3"],
    key: jax.Array,
    step: jax.Array,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """The sum of both losses of clips of one length, and its parts by name."""
    cfg, weights = networks.objective, params["vae"]
    video = to_model(pixels)
    encoder = weights["encoder"]
    if networks.freeze_encoder:
        encoder = jax.lax.stop_gradient(encoder)
    raw = whole(vae.encode, networks.vae, {"encoder": encoder}, video)
    moments = vae.moments(raw)
    latents = moments.sample(jax.random.normal(key, moments.mean.shape, jnp.float32))

    def reconstruct(kernel: jax.Array) -> jax.Array:
        decoder = with_last_kernel(weights["decoder"], kernel)
        return whole(vae.decode, networks.vae, {"decoder": decoder}, latents)

    functions = critics(networks, params)
    out = vae_objective.autoencoder_loss(
        cfg,
        video,
        step,
        reconstruct=reconstruct,
        kernel=last_kernel(weights["decoder"]),
        kl=moments.kl(),
        **functions,
    )
    losses = out.parts
    parts = {"loss_pixel": losses.pixel, "kl": losses.kl}
    if networks.perceived:
        parts["loss_perceptual"] = losses.perceptual
    if not networks.judged:
        return out.loss, parts
    judged = vae_objective.discriminator_loss(
        cfg, functions["judge"], video, out.reconstruction, step
    )
    parts |= {
        "adversarial": losses.adversarial,
        "adversarial_weight": losses.adversarial_weight,
        "loss_discriminator": judged.loss,
        "logit_real": judged.real,
        "logit_fake": judged.fake,
    }
    return out.loss + judged.loss, parts


def whole(
    network: Callable[..., Any],
    cfg: VAEConfig,
    params: Any,
    x: Float[jax.Array, "b f h w c"],
) -> Float[jax.Array, "b _ _ _ _"]:
    """`vae.encode` or `vae.decode` of whole videos.

    Where the mesh divides frames, its devices share each video: the first frame is on
    all of them, and gradients cross the borders between them.
    """
    if sharding.shares("frames") == 1:
        return network(cfg, params, x)[0]
    step = vae_step(network, cfg, params, jax.sharding.get_abstract_mesh())
    return chunked(step, x, first=1, window=max(1, x.shape[1] - 1))


def critics(networks: VAENetworks, params: Any) -> dict[str, Any]:
    """The functions `perceptual` and `judge`, where the objective needs them."""
    functions = {}
    if networks.perceived:
        weights = {"params": params["perceptual"]}
        functions["perceptual"] = partial(LPIPS(networks.lpips).apply, weights)
    if networks.judged:
        weights = {"params": params["discriminator"]}
        judge = Discriminator(networks.discriminator)
        functions["judge"] = partial(judge.apply, weights)
    return functions


def last_kernel(decoder: Mapping[str, Any]) -> jax.Array:
    """The kernel of a decoder's last convolution."""
    return decoder["head"]["convolution"]["kernel"]


def with_last_kernel(decoder: Mapping[str, Any], kernel: jax.Array) -> dict[str, Any]:
    """The decoder's weights with another last kernel."""
    head = decoder["head"]
    convolution = {**head["convolution"], "kernel": kernel}
    return {**decoder, "head": {**head, "convolution": convolution}}
