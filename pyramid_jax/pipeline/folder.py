# SPDX-License-Identifier: Apache-2.0
"""A model in a folder: config.json, weights.safetensors, tokenizer.json, vae/, ..."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pyramid_jax import sharding
from pyramid_jax.checkpoint.trees import placing, read_tree, write_tree
from pyramid_jax.data.tokenizer import Tokenize, load_tokenizer
from pyramid_jax.model import (
    ModelConfig,
    SampleConfig,
    initialise,
    model_config,
    model_section,
    sample_config,
)
from pyramid_jax.pipeline import prompts as released
from pyramid_jax.pipeline.prompts import Network, PromptEncoder
from pyramid_jax.sharding import unbox
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder


class Placing(NamedTuple):
    """Where weights go; see `generate.load`."""

    mesh: Mesh | None = None
    dtype: str | None = None
    offload: bool = False

    def rest(self, params: Any) -> Any:
        """The weights where they are while nobody uses them."""
        return sharding.parked(params) if self.offload else params


class Saved(NamedTuple):
    """What a folder holds; see `generate.VideoPipeline`."""

    cfg: ModelConfig
    params: Any
    tokenize: Tokenize
    defaults: SampleConfig
    vae: Autoencoder | None
    prompts: PromptEncoder | None
    name: str


def read(folder: str | Path, place: Placing, text: bool = True) -> Saved:
    """The model in a folder; one part is on the devices at a time if it is offloaded.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    about = folder / "config.json"
    if not about.is_file():
        raise ValueError(f"{folder} has no config.json; give a folder of a saved model")
    sections = json.loads(about.read_text())
    cfg = model_config(sections["model"])
    if place.dtype is not None:
        cfg = replace(cfg, dit=replace(cfg.dit, dtype=place.dtype))
    like = jax.eval_shape(partial(initialise, cfg), jax.random.key(0))
    to = placing(like, place.mesh, place.dtype)
    params = read_tree(folder / "weights.safetensors", unbox(like), to)
    beside = folder / cfg.tokenizer
    return Saved(
        cfg,
        place.rest(params),
        load_tokenizer(beside if beside.is_file() else cfg.tokenizer),
        sample_config(sections["sample"]),
        _vae(folder, cfg, place),
        _prompts(folder, cfg, place) if text else None,
        folder.resolve().name,
    )


def save(
    folder: str | Path,
    cfg: ModelConfig,
    defaults: SampleConfig,
    params: Any,
    vae: Autoencoder | None = None,
) -> None:
    """Writes config.json, weights.safetensors, tokenizer.json, and a VAE into vae/.

    Weights are host arrays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if Path(cfg.tokenizer).is_file():
        kept = folder / "tokenizer.json"
        if not (kept.exists() and kept.samefile(cfg.tokenizer)):
            shutil.copyfile(cfg.tokenizer, kept)
        cfg = replace(cfg, tokenizer=kept.name)
    sections = {
        "model": model_section(cfg),
        "sample": asdict(defaults),
    }
    (folder / "config.json").write_text(json.dumps(sections, indent=1) + "\n")
    write_tree(folder / "weights.safetensors", params)
    if vae is not None:
        autoencoder.save(folder / autoencoder.INSIDE, vae)


def _vae(folder: Path, cfg: ModelConfig, place: Placing) -> Autoencoder | None:
    inside = folder / autoencoder.INSIDE
    if not inside.is_dir():
        return None
    vae = autoencoder.load(inside, place.dtype, place.mesh)
    if vae.latent != cfg.latent:
        raise ValueError(
            f"{inside} has latents {vae.latent}, but the model was trained on "
            f"{cfg.latent}; put the VAE there that made the latents of its training"
        )
    return vae._replace(params=place.rest(vae.params))


def _prompts(folder: Path, cfg: ModelConfig, place: Placing) -> PromptEncoder | None:
    if cfg.text is not None or not any(folder.glob("text_encoder*")):
        return None
    found = released.load(folder, place.dtype or cfg.dit.dtype, place.mesh)

    def rest(network: Network) -> Network:
        return network._replace(params=place.rest(network.params))

    return replace(found, t5=rest(found.t5), clips=tuple(map(rest, found.clips)))
