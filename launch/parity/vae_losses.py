# SPDX-License-Identifier: Apache-2.0
"""LPIPS, and the losses of VAE training with the gradients of both networks."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Float

from launch.parity.cases import LOSS, QUICK, VAE, Answer, Case, Scenario, latent_back
from launch.parity.vae import Autoencoder, load
from pyramid_jax.checkpoint import loss_tables, rename
from pyramid_jax.checkpoint.dit_tables import Table
from pyramid_jax.checkpoint.tensors import read_tensors
from pyramid_jax.checkpoint.vae_tables import vae_table
from pyramid_jax.models import lpips, vae
from pyramid_jax.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    initialise_discriminator,
)
from pyramid_jax.models.lpips import LPIPS, LPIPSConfig
from pyramid_jax.vae.networks import last_kernel, with_last_kernel
from pyramid_jax.vae.objective import (
    Judged,
    ObjectiveConfig,
    Reconstructed,
    autoencoder_loss,
    discriminator_loss,
)

Images = Float[jax.Array, "n _ _ 3"]
Video = Float[jax.Array, "b _ _ _ _"]
FRAMES = "b f h w c -> (b f) h w c"


class VAENetworks(NamedTuple):
    """The networks of a case, and the weights of their losses."""

    vae: Autoencoder
    features: LPIPSConfig
    judge: DiscriminatorConfig
    objective: ObjectiveConfig
    weights: dict[str, Any]  # "vae", "features", "judge"

    def distance(self, weights: Any, x: Images, y: Images) -> jax.Array:
        """The perceptual distance of the images of each pair."""
        out: Any = LPIPS(self.features).apply({"params": weights}, x, y)
        return out

    def logits(self, weights: Any, video: Video) -> jax.Array:
        """The logits of the judge for a video."""
        out: Any = Discriminator(self.judge).apply({"params": weights}, video)
        return out


class Evaluation(NamedTuple):
    """Moments of the latents, and both losses with their parts."""

    moments: Video
    autoencoder: Reconstructed
    discriminator: Judged


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "loss_class" in scenario.settings


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to recorded losses."""
    if "in.a" in scenario.tensors:
        yield from _distances(scenario)
        return
    networks = _networks(case, scenario.settings)
    run = _both_losses(networks)
    inputs = [jnp.asarray(scenario.latent(f"in.{n}")) for n in ("x", "posterior_noise")]
    for step in _steps(scenario):
        (_, losses), slopes = run(networks.weights, *inputs, jnp.int32(step))
        if step == _steps(scenario)[0]:
            yield from _states(networks, scenario, losses)
        factor = networks.objective.discriminator_factor
        yield from _logs(f"out.step{step}", factor, losses)
        yield from _slopes(f"out.step{step}", scenario, networks, slopes)


# ------------------------------------------------------------------------------- LPIPS


def _distances(scenario: Scenario) -> Iterator[Answer]:
    cfg = LPIPSConfig()
    params = _lpips(cfg, _drawn(scenario.settings["weights_recipe"]))
    x, y = (
        jnp.asarray(rearrange(scenario.tensors[name], "b c h w -> b h w c"))
        for name in ("in.a", "in.b")
    )
    parts = jax.jit(_contributions, compiler_options=QUICK)(params, x, y)
    for i, part in enumerate(parts):
        yield Answer(f"out.layer{i}", _per_image(part), LOSS, relative=True)
    total = jnp.stack(parts).sum(axis=0)
    yield Answer("out.lpips", _per_image(total), LOSS, relative=True)


def _contributions(params: Any, x: Images, y: Images) -> list[jax.Array]:
    out: Any = LPIPS().apply({"params": params}, x, y, method="contributions")
    return out


def _drawn(recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights that were not stored but drawn in a fixed order."""
    source, tensors = np.random.RandomState(recipe["seed"]), {}
    for one in recipe["keys"]:
        r = source.standard_normal(size=one["shape"]).astype(np.float32)
        r = np.abs(r) if one["formula"].startswith("abs") else r
        tensors[one["key"]] = r * np.float32(one["scale"])
    return tensors


def _lpips(cfg: LPIPSConfig, tensors: Mapping[str, Any]) -> Any:
    table = loss_tables.lpips_table(lpips.SHIFT, lpips.SCALE)
    constants = {key: constant.value() for key, constant in table.constants.items()}
    theirs = {**constants, **tensors}
    params = rename.convert_tensors(theirs, table, lpips.lpips_shapes(cfg))
    return jax.tree.map(jnp.asarray, params)


def _per_image(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b -> b 1 1 1")


# ------------------------------------------------------------------------------ losses


def _networks(case: Case, settings: dict[str, Any]) -> VAENetworks:
    arguments = settings["loss_constructor"]
    tensors = read_tensors(case.folder / loss_weights(settings))
    features = LPIPSConfig(tuple(arguments["lpips_vgg_widths"]))
    judge = DiscriminatorConfig(
        kind="3d" if arguments["using_3d_discriminator"] else "2d",
        width=arguments["discriminator_ndf"],
        layers=arguments["disc_num_layers"],
    )
    objective = ObjectiveConfig(
        pixel=arguments["pixelloss_weight"],
        perceptual=arguments["perceptual_weight"],
        kl=arguments["kl_weight"],
        adversarial=arguments["disc_weight"],
        discriminator=judge.kind,
        discriminator_start=arguments["disc_start"],
        adversarial_loss=arguments["disc_loss"],
        discriminator_factor=arguments.get("disc_factor", 1.0),
        log_variance=arguments["logvar_init"],
    )
    model = load(case.folder / settings["vae_weights"], settings["vae_constructor"])
    abstract = jax.eval_shape(
        lambda key: initialise_discriminator(judge, key), jax.random.key(0)
    )
    own = _part(tensors, "discriminator.")
    params = rename.convert_tensors(own, _judge_table(judge), abstract)
    weights = {
        "vae": model.params,
        "features": _lpips(features, _part(tensors, "perceptual_loss.")),
        "judge": jax.tree.map(jnp.asarray, params),
    }
    return VAENetworks(model, features, judge, objective, weights)


def loss_weights(settings: dict[str, Any]) -> str:
    """The name of the file with the weights of the losses' networks."""
    shapes = settings["state_dict_shapes"]
    start = "discriminator."
    return next(n for n in shapes if any(key.startswith(start) for key in shapes[n]))


def _part(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): x
        for key, x in tensors.items()
        if key.startswith(prefix)
    }


def _judge_table(cfg: DiscriminatorConfig) -> Table:
    return loss_tables.discriminator_table(len(cfg.strides), cfg.kind)


def _steps(scenario: Scenario) -> list[int]:
    """The training steps whose losses were recorded."""
    end = ".generator_loss"
    names = [name for name in scenario.tensors if name.endswith(end)]
    return sorted(int(name.removesuffix(end).split("step")[1]) for name in names)


def _both_losses(networks: VAENetworks) -> Any:
    """A function of (weights, video, noise, step): the losses' sum with its parts.

    One gradient of the sum is that of the autoencoder and that of the discriminator.
    """
    cfg, objective = networks.vae.cfg, networks.objective

    def loss(
        weights: dict[str, Any], video: Video, noise: Video, step: jax.Array
    ) -> tuple[jax.Array, Evaluation]:
        params, frames = weights["vae"], cfg.frames(noise.shape[1])
        raw, _ = vae.encode(cfg, params, video[:, :frames])
        moments = vae.moments(raw)
        latents = moments.sample(noise)
        # Recorded clips may be longer than their latents; the frames behind the last
        # latent change none, and the original broadcasts the reconstruction.
        again = video.shape[1] // frames

        def reconstruct(kernel: jax.Array) -> jax.Array:
            decoder = with_last_kernel(params["decoder"], kernel)
            out, _ = vae.decode(cfg, {"decoder": decoder}, latents)
            return repeat(out, "b f h w c -> b (f again) h w c", again=again)

        judge = partial(networks.logits, weights["judge"])
        out = autoencoder_loss(
            objective,
            video,
            step,
            reconstruct=reconstruct,
            kernel=last_kernel(params["decoder"]),
            kl=moments.kl(),
            perceptual=partial(networks.distance, weights["features"]),
            judge=judge,
        )
        fake = out.reconstruction
        judged = discriminator_loss(objective, judge, video, fake, step)
        return out.loss + judged.loss, Evaluation(raw, out, judged)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


# ----------------------------------------------------------------------------- answers


def _states(
    networks: VAENetworks, scenario: Scenario, losses: Evaluation
) -> Iterator[Answer]:
    """Moments, reconstruction, features, distances and logits."""
    video, fake = (
        jnp.asarray(scenario.latent("in.x")),
        losses.autoencoder.reconstruction,
    )
    frames = networks.vae.cfg.frames(losses.moments.shape[1])
    yield Answer("mid.moments", latent_back(losses.moments), VAE)
    yield Answer("mid.reconstruction", latent_back(fake[:, :frames]), VAE)
    seen = jax.jit(partial(_seen, networks), compiler_options=QUICK)
    distance, features, logits = seen(networks.weights, video, fake)
    yield Answer("mid.lpips", _per_image(distance), LOSS, relative=True)
    for i, x in enumerate(features):
        x = rearrange(np.asarray(x[: min(2, frames)]), "n h w c -> n c h w")
        yield Answer(f"mid.vgg{i}", x, LOSS, relative=True)
    alone = networks.judge.kind == "2d"
    pattern = "b f h w -> (b f) 1 h w" if alone else "b f h w -> b 1 f h w"
    for name, x in zip(("real", "fake"), logits, strict=True):
        x = x[:, :frames] if alone and name == "fake" else x
        yield Answer(
            f"mid.logits_{name}", rearrange(np.asarray(x), pattern), LOSS, relative=True
        )


def _seen(networks: VAENetworks, weights: Any, video: Video, fake: Video) -> Any:
    """Distances and features of all frames, and the logits of both videos."""
    x, y = (rearrange(v, FRAMES) for v in (video, fake))
    bound = LPIPS(networks.features).bind({"params": weights["features"]})
    judge = partial(networks.logits, weights["judge"])
    return bound(x, y), bound.features(y), (judge(video), judge(fake))


def _logs(step: str, factor: float, losses: Evaluation) -> Iterator[Answer]:
    """The losses and their parts, as the original logs them."""
    loss, parts, _ = losses.autoencoder
    values = {
        "generator_loss": loss,
        "log.train.total_loss": loss,
        "log.train.logvar": parts.log_variance,
        "log.train.kl_loss": parts.kl,
        "log.train.nll_loss": parts.nll,
        "log.train.rec_loss": parts.pixel,
        "log.train.perception_loss": parts.perceptual,
        "log.train.d_weight": parts.adversarial_weight,
        "log.train.disc_factor": factor * (parts.adversarial_weight > 0),
        "log.train.g_loss": parts.adversarial,
        "disc_loss": losses.discriminator.loss,
        "log_disc.train.disc_loss": losses.discriminator.loss,
        "log_disc.train.logits_real": losses.discriminator.real,
        "log_disc.train.logits_fake": losses.discriminator.fake,
    }
    for name, value in values.items():
        yield Answer(f"{step}.{name}", value, LOSS, relative=True)


def _slopes(
    step: str, scenario: Scenario, networks: VAENetworks, slopes: Any
) -> Iterator[Answer]:
    """Gradients by the original's names, and their norms in the recorded order."""
    for part, table in (
        ("vae", vae_table(networks.vae.cfg)),
        ("disc", _judge_table(networks.judge)),
    ):
        own = slopes["judge" if part == "disc" else part]
        named = dict(rename.export_tensors(jax.device_get(own), table))
        order = scenario.settings[f"{part}_param_order"]
        norms = [np.linalg.norm(named[key].astype(np.float64)) for key in order]
        yield Answer(f"{step}.{part}_grad_norms", norms, LOSS, relative=True)
        for key, value in named.items():
            yield Answer(f"{step}.grad.{key}", value, LOSS, relative=True)
