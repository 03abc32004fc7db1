# SPDX-License-Identifier: Apache-2.0
"""A VAE in a folder: its config, the statistics of its latents, and its weights."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pyramid_jax.checkpoint.trees import read_tree, write_tree
from pyramid_jax.config import build
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.sharding import unbox


class Autoencoder(NamedTuple):
    """A VAE with its weights {"encoder": ..., "decoder": ...}.

    `latent` says how its latents are normalised.
    """

    cfg: VAEConfig
    latent: LatentConfig
    params: Any


def save(folder: str | Path, made: Autoencoder) -> None:
    """Writes config.json and weights.safetensors; the weights are host arrays."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "vae": dataclasses.asdict(made.cfg),
        "latent": dataclasses.asdict(made.latent),
    }
    (folder / "config.json").write_text(json.dumps(sections, indent=1) + "\n")
    write_tree(folder / "weights.safetensors", made.params)


def load(folder: str | Path) -> Autoencoder:
    """The VAE in a folder that `save` wrote.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    about = folder / "config.json"
    sections = json.loads(about.read_text()) if about.is_file() else {}
    if not {"vae", "latent"} <= sections.keys():
        raise ValueError(
            f"{folder} holds no config.json of a VAE; give the `model` folder of a run "
            "of launch.train_vae"
        )
    cfg = build(VAEConfig, sections["vae"])
    like = unbox(jax.eval_shape(partial(vae.initialise, cfg), jax.random.key(0)))
    params = jax.tree.map(jnp.asarray, read_tree(folder / "weights.safetensors", like))
    return Autoencoder(cfg, build(LatentConfig, sections["latent"]), params)
