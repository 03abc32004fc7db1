# SPDX-License-Identifier: Apache-2.0
"""A model in a folder: config.json, weights.safetensors, tokenizer.json, vae/, ..."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pyramid_jax import model, sharding
from pyramid_jax.checkpoint import files
from pyramid_jax.config import asset_path
from pyramid_jax.data.tokenizer import Tokenize, load_tokenizer
from pyramid_jax.kernels.quantised import QUANTISED
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.pipeline.adapters import merged_into, sampling
from pyramid_jax.pipeline.prompts import PromptEncoder, load_prompt_encoder
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import INSIDE, Autoencoder

# The models that ship with the package: pixels are latents, or a VAE makes them.
ASSETS = Path(__file__).parents[1] / "assets"
TINY, PAIRS = ASSETS / "tiny", ASSETS / "pairs"
DTYPES = ("float32", "bfloat16", *QUANTISED)  # that a model is read in


class SavedModel(NamedTuple):
    """The contents of a folder; see `pipeline.video.VideoPipeline`."""

    cfg: ModelConfig
    params: Any
    tokenize: Tokenize
    defaults: SampleConfig
    vae: Autoencoder | None
    prompts: PromptEncoder | None
    name: str


def read_model(
    folder: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    text: bool = True,
    offload: bool = False,
    unrolled: bool = False,
    *,
    lora: Mapping[str | Path, float] = MappingProxyType({}),
) -> SavedModel:
    """The model in a folder; see `pipeline.video.load`.

    Of an offloaded model one part is on the devices at a time.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = asset_path(folder)
    sections = files.read_config(folder, "a model", "model", "sample")
    cfg = model.model_config(sections["model"])
    if dtype in QUANTISED:
        cfg, dtype = replace(cfg, dit=replace(cfg.dit, products=dtype)), "bfloat16"
    if dtype is not None:
        cfg = replace(cfg, dit=replace(cfg.dit, dtype=dtype))
    abstract = jax.eval_shape(partial(model.initialise, cfg), jax.random.key(0))
    place, name = files.placing(abstract, mesh, dtype), folder.resolve().name
    sample = sections["sample"]
    for file, strength in lora.items():
        file = asset_path(file)
        place = merged_into(cfg.dit, place, file, strength)
        sample = sampling(file) or sample
        name += f"+{file.stem}:{strength:g}"
    params = files.read_weights(folder, abstract, place)
    params = model.unrolled(params) if unrolled else params
    params = sharding.parked(params) if offload else params
    vae = _vae(folder, cfg, dtype, mesh)
    if vae is not None and offload:
        vae = vae._replace(params=sharding.parked(vae.params))
    prompts = None
    if text and cfg.text is None and any(folder.glob("text_encoder*")):
        prompts = load_prompt_encoder(folder, dtype or cfg.dit.dtype, mesh)
        prompts = prompts.parked() if offload else prompts
    tokenizer = folder / cfg.tokenizer
    return SavedModel(
        cfg,
        params,
        load_tokenizer(
            tokenizer if tokenizer.is_file() else cfg.tokenizer,
            cfg.text and cfg.text.vocabulary,
        ),
        model.sample_config(sample),
        vae,
        prompts,
        name,
    )


def save_model(
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
    if (tokenizer := asset_path(cfg.tokenizer)).is_file():
        copy = folder / "tokenizer.json"
        if not (copy.exists() and copy.samefile(tokenizer)):
            shutil.copyfile(tokenizer, copy)
        cfg = replace(cfg, tokenizer=copy.name)
    files.write_config(
        folder, {"model": model.model_section(cfg), "sample": asdict(defaults)}
    )
    files.write_weights(folder, params)
    if vae is not None:
        autoencoder.save_autoencoder(folder / INSIDE, vae)


def _vae(
    folder: Path, cfg: ModelConfig, dtype: str | None, mesh: Mesh | None
) -> Autoencoder | None:
    inside = folder / INSIDE
    if not inside.is_dir():
        return None
    vae = autoencoder.load_autoencoder(inside, dtype, mesh)
    if vae.latent != cfg.latent:
        raise ValueError(
            f"{inside} has latents {vae.latent}, but the model was trained on "
            f"{cfg.latent}; put the VAE there that made the latents of its training"
        )
    return vae
