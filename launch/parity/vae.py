# SPDX-License-Identifier: Apache-2.0
"""The VAE: moments, pixels and the states between; whole, in chunks and in tiles.

Also what it does before and after sampling: the first latent of image to video, and the
frames of a sampled video.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from launch.parity.cases import (
    QUICK,
    SAMPLING,
    VAE,
    Answer,
    Case,
    Scenario,
    latent_back,
)
from pyramid_jax.checkpoint import rename, tensors
from pyramid_jax.checkpoint.vae_tables import vae_table
from pyramid_jax.convert import configs
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.vae import codec

# Names of the recorded states, as patterns over the paths of layers here.
STATES = {
    "conv_in": "entry",
    "down_blocks.{}": "levels_{}",
    "up_blocks.{}": "levels_{}",
    "mid_block": "middle",
    "mid_block.attention": "middle/attention",
    "conv_norm_out": "head/norm",
    "out": "head",
}


class Autoencoder(NamedTuple):
    """A VAE with its weights."""

    cfg: VAEConfig
    params: Any

    def encode(self, pixels: Any, past: Any) -> tuple[jax.Array, Any]:
        """Raw moments of some frames, see `models.vae.encode`."""
        return _run(vae.encode, self.cfg, self.params, pixels, past)

    def decode(self, latents: Any, past: Any) -> tuple[jax.Array, Any]:
        """Pixels of some latents, see `models.vae.decode`."""
        return _run(vae.decode, self.cfg, self.params, latents, past)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _run(f: Any, cfg: VAEConfig, params: Any, x: Any, past: Any) -> Any:
    return f(cfg, params, x, past)


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return scenario.settings.get("model_class") == "CausalVideoVAE"


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to recorded calls of the VAE."""
    model = load(case.weights(), scenario.settings["constructor"])
    pixels = scenario.latent("in.x")
    if "out.moments" in scenario.tensors:
        yield from _whole(model, scenario, pixels)
        yield from _states(model, scenario, pixels)
    if "in.z" in scenario.tensors:
        yield from _pieces(model, scenario, pixels)


def load(weights: Path, constructor: dict[str, Any]) -> Autoencoder:
    """The VAE of the original's constructor arguments, with recorded weights."""
    return _load(weights.resolve(), json.dumps(constructor, sort_keys=True))


@lru_cache(maxsize=2)
def _load(weights: Path, constructor: str) -> Autoencoder:
    cfg = VAEConfig(**configs.vae_config(json.loads(constructor)))
    abstract = jax.eval_shape(partial(vae.initialise_vae, cfg), jax.random.key(0))
    theirs = tensors.read_tensors(weights)
    params = rename.convert_tensors(theirs, vae_table(cfg), abstract)
    return Autoencoder(cfg, jax.tree.map(jnp.asarray, params))


def of_sampling(case: Case) -> Autoencoder | None:
    """The VAE of a sampling case; None where its weights are not beside it."""
    path = case.folder / case.config.get("vae_weights", "none")
    if not path.is_file():
        return None
    return load(path, case.config["vae_constructor"])


def latent_config(case: Case) -> LatentConfig:
    """The statistics of latents that a sampling case was recorded with."""
    settings = case.config
    return LatentConfig(
        image_shift=settings["vae_shift_factor"],
        image_scale=settings["vae_scale_factor"],
        video_shift=settings["vae_video_shift_factor"],
        video_scale=settings["vae_video_scale_factor"],
    )


def first_latent(model: Autoencoder, case: Case, scenario: Scenario) -> np.ndarray:
    """The normalised latent of the recorded image."""
    image = scenario.tensors["in.image"].astype(np.float32) / 127.5 - 1
    raw, _ = model.encode(image[None, None], None)
    noise = jnp.asarray(scenario.latent("draw.image_posterior_noise"))
    return np.asarray(latent_config(case).normalise(vae.moments(raw).sample(noise)))


def frames(model: Autoencoder, case: Case, latents: jax.Array) -> Iterator[Answer]:
    """The frames of sampled latents: two latents, then one at a time."""
    raw = latent_config(case).denormalise(latents)
    pixels = np.asarray(codec.chunked(model.decode, raw, first=2, window=1))
    yield Answer("out.decoded_every4", latent_back(pixels[:, ::4]), SAMPLING)
    levels = np.clip(127.5 * pixels + 127.5, 0, 255).astype(np.uint8)
    levels = rearrange(levels, "b f h w c -> (b f) h w c")
    note = "of 255: rounding down turns the smallest difference into a whole level"
    yield Answer("out.frames_uint8", levels, 1.0, note=note)


def _whole(model: Autoencoder, scenario: Scenario, pixels: Any) -> Iterator[Answer]:
    raw, _ = model.encode(pixels, None)
    posterior = vae.moments(raw)
    z = posterior.sample(jnp.asarray(scenario.latent("in.posterior_noise")))
    decoded, mode = model.decode(z, None)[0], model.decode(posterior.mean, None)[0]
    values = {
        "moments": raw,
        "mean": posterior.mean,
        "std": posterior.deviation,
        "z": z,
        "decoded": decoded,
        "decoded_mode": mode,
    }
    for name, value in values.items():
        yield Answer(f"out.{name}", latent_back(value), VAE)
    yield Answer("out.kl", posterior.kl(), VAE, relative=True)


def _states(model: Autoencoder, scenario: Scenario, pixels: Any) -> Iterator[Answer]:
    """The outputs of layers, to find where a difference begins."""
    z = scenario.latent("out.z")
    for part, x in ((vae.Encoder(model.cfg), pixels), (vae.Decoder(model.cfg), z)):
        network = type(part).__name__.lower()
        prefix = f"mid.{network}."
        if not any(name.startswith(prefix) for name in scenario.tensors):
            continue
        seen = _captured(part, model.params[network], x)
        for theirs, ours in STATES.items():
            for i in range(len(model.cfg.spatial) if "{}" in theirs else 1):
                value = latent_back(seen[ours.format(i)])
                if theirs.endswith("attention"):
                    value = rearrange(value, "b c t h w -> (b t) c h w")
                yield Answer(prefix + theirs.format(i), value, VAE)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _captured(network: Any, params: Any, x: Any) -> dict[str, jax.Array]:
    """The output of every layer, by its path; without the past."""
    _, state = network.apply({"params": params}, x, capture_intermediates=True)
    states = {}
    leaves = jax.tree_util.tree_leaves_with_path(
        state["intermediates"], is_leaf=lambda x: isinstance(x, tuple)
    )
    for path, outputs in leaves:
        names = "/".join(str(entry.key) for entry in path[:-1])
        output = outputs[0]
        states[names] = output[0] if isinstance(output, tuple) else output
    return states


def _pieces(model: Autoencoder, scenario: Scenario, pixels: Any) -> Iterator[Answer]:
    """Whole, chunked and tiled runs, as the names of the recorded results say."""
    z, settings = scenario.latent("in.z"), scenario.settings
    tile = int(settings.get("tile_sample_min_size", 0))
    factor = model.cfg.spatial_factor
    for name in scenario.tensors:
        match = re.fullmatch(
            r"out\.(moments|decoded)_(plain|tiled)?_?(chunk)?(?:_w(\d+))?", name
        )
        if match is None:
            continue
        kind, how, chunk, window = match.groups()
        of = "encode" if kind == "moments" else "decode"
        step, x, side, scale = (
            (model.encode, pixels, tile, 1 / factor)
            if of == "encode"
            else (model.decode, z, tile // factor, factor)
        )
        run = partial(_first, step)
        if chunk:
            frames = int(window or settings[f"{of}_window_size"])
            run = partial(codec.chunked, step, first=frames + 1, window=frames)
        if how == "tiled":
            run = partial(codec.tiled, run, tile=side, scale=scale)
        yield Answer(name, latent_back(run(x=x)), VAE)


def _first(step: Any, x: Any) -> jax.Array:
    return step(x, None)[0]
