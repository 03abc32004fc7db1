# SPDX-License-Identifier: Apache-2.0
"""Folders of released models: what is in them, and all that is wrong with them.

    diffusion_transformer_384p/  causal_video_vae/  text_encoder/  tokenizer/  ...

One folder per network, with a config.json and weights: safetensors, or files of
PyTorch. The SD3-style model has three text encoders, miniFLUX two. Names, types and
shapes come from the headers of files: opening a folder reads no weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pyramid_jax.checkpoint import files, rename, text_tables, vae_tables
from pyramid_jax.checkpoint.dit_tables import Table
from pyramid_jax.checkpoint.tensors import read_tensors, subset
from pyramid_jax.convert import configs
from pyramid_jax.layout import Layout
from pyramid_jax.model import ModelConfig
from pyramid_jax.models import vae as vaes
from pyramid_jax.models.dit import DiTConfig, initialise_dit
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.adapters import dit_table
from pyramid_jax.pipeline.prompts import EncoderConfig

DIT, VAE = "diffusion_transformer", "causal_video_vae"
DTYPE = "bfloat16"  # in which the released models run
NetworkConfig = DiTConfig | VAEConfig | EncoderConfig


@dataclass(frozen=True)
class ReleasedFolder:
    """Where a released model is.

    Args:
        variant: the folder of the transformer; None: the only one there is.
        dit, vae: files or folders with other weights for these two, such as checkpoints
            of the original's training; None: those of the folder.
        text: text encoders and tokenizers belong to the model, too.
    """

    folder: Path
    variant: str | None = None
    dit: Path | None = None
    vae: Path | None = None
    text: bool = True


class ReleasedNetwork(NamedTuple):
    """One network: its folder's name, its config.json, what that means, its tensors."""

    name: str
    config: Mapping[str, Any]
    cfg: NetworkConfig
    tensors: Mapping[str, Any]


@dataclass
class ReleasedModel:
    """The networks of a folder by name, and all problems; without any, the model."""

    networks: dict[str, ReleasedNetwork] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    model: ModelConfig | None = None

    def attempt(self, name: str, f: Callable[..., Any], *args: Any) -> Any:
        """The result of `f`; None, and a new problem, if it raises a ValueError."""
        try:
            return f(*args)
        except ValueError as error:
            self.problems.append(f"{name}: {error}".removeprefix(": "))
            return None

    def open(
        self,
        folder: Path,
        describe: Callable[[Mapping[str, Any]], NetworkConfig],
        weights: Path | None = None,
        start: str = "",
    ) -> ReleasedNetwork | None:
        """Adds the network in a folder, if it fits; its tensors may be elsewhere.

        Args:
            describe: makes the network's config from the contents of config.json.
            start: of the names of its tensors, see `subset`.
        """
        name = folder.name
        if not folder.is_dir():
            self.problems.append(f"{name}: this folder is missing")
            return None
        config = self.attempt(name, files.read_config, folder, "a released network")
        tensors = self.attempt(name, read_tensors, weights or folder)
        cfg = None
        if config is not None:
            cfg = self.attempt(name, _described, describe, config)
        if config is None or cfg is None or tensors is None:
            return None
        table, abstract = tensor_table(cfg), abstract_weights(cfg)
        names = rename.tensor_specs(abstract, table)
        network = ReleasedNetwork(name, config, cfg, subset(tensors, start, names))
        unique = text_tables.without_copies(network.tensors)
        problems = rename.shape_problems(unique, table, abstract)
        self.problems += [f"{name}: {problem}" for problem in problems]
        self.networks[name] = network
        return network


def open_released(source: ReleasedFolder) -> ReleasedModel:
    """Everything that the folder of a released model should hold, checked."""
    released, folder = ReleasedModel(), source.folder
    name = released.attempt("", _variant, source)
    dit = None
    if name is not None:
        dit = released.open(folder / name, _dit_config, source.dit, "dit.")
    vae = released.open(folder / VAE, _vae_config, source.vae, "vae.")
    encoders = []
    for end in _ends(folder, dit) if source.text else ():
        encoder = released.open(folder / f"text_encoder{end}", prompts.encoder_config)
        encoders.append(encoder)
        if encoder is not None:
            load, beside = prompts.load_prompt_tokenizer, folder / f"tokenizer{end}"
            released.attempt(beside.name, load, beside, encoder.cfg)
    model = None
    if dit is not None and vae is not None:
        model = released.attempt(dit.name, _model, dit, vae)
    if model is not None and encoders and all(encoders):
        released.attempt("text encoders", _check_widths, model, encoders)
    released.model = None if released.problems else model
    return released


# ------------------------------------------------------------- networks without weights


@lru_cache
def tensor_table(cfg: NetworkConfig) -> Table:
    """The names that the original gives to the weights of a network like `cfg`."""
    if isinstance(cfg, VAEConfig):
        return vae_tables.vae_table(cfg)
    if isinstance(cfg, EncoderConfig):
        return prompts.encoder_table(cfg)
    return dit_table(cfg)


@lru_cache
def abstract_weights(cfg: NetworkConfig) -> Any:
    """The shapes of a network's weights here, in boxes that name their axes."""
    if isinstance(cfg, EncoderConfig):
        return prompts.abstract_encoder(cfg)
    initialise = initialise_dit if isinstance(cfg, DiTConfig) else vaes.initialise_vae
    return jax.eval_shape(partial(initialise, cfg), jax.random.key(0))


# ------------------------------------------------------------------------------ opening


def _variant(source: ReleasedFolder) -> str:
    names = sorted(p.name for p in source.folder.glob(f"{DIT}*") if p.is_dir())
    if source.variant is None and len(names) == 1:
        return names[0]
    if source.variant not in names:
        raise ValueError(
            f"{source.folder} has the transformers {names}, and {source.variant!r} was "
            "asked for; choose one of them as the variant"
        )
    return source.variant


def _described(
    describe: Callable[[Mapping[str, Any]], NetworkConfig], config: Mapping[str, Any]
) -> NetworkConfig:
    try:
        cfg = describe(config)
        _ = tensor_table(cfg), abstract_weights(cfg)  # impossible sizes show here
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{files.CONFIG} lacks or misstates {error}; copy it again"
        ) from error
    return cfg


def _dit_config(config: Mapping[str, Any]) -> DiTConfig:
    return DiTConfig(**configs.dit_config(config).dit, dtype=DTYPE)


def _vae_config(config: Mapping[str, Any]) -> VAEConfig:
    return VAEConfig(**configs.vae_config(config), dtype=DTYPE)


def _ends(folder: Path, dit: ReleasedNetwork | None) -> list[str]:
    """The ends of the names of the text encoders that the transformer reads."""
    if dit is not None and isinstance(dit.cfg, DiTConfig):
        count = 2 if dit.cfg.position_table is None else 3
        return list(prompts.FOLDERS[:count])
    return [end for end in prompts.FOLDERS if (folder / f"text_encoder{end}").is_dir()]


def _model(dit: ReleasedNetwork, vae: ReleasedNetwork) -> ModelConfig:
    """The model of transformer and VAE; ValueError if they don't fit."""
    arguments, pixels = configs.dit_config(dit.config), vae.cfg
    assert isinstance(dit.cfg, DiTConfig) and isinstance(pixels, VAEConfig)
    latent = replace(pixels.latents, **arguments.latent)
    return ModelConfig(dit.cfg, Layout(**arguments.layout), latent)


def _check_widths(model: ModelConfig, encoders: list[ReleasedNetwork]) -> None:
    """Raises ValueError unless the encoders make what the transformer reads."""
    cfgs: list[Any] = [encoder.cfg for encoder in encoders]
    words = [cfg.width for cfg in cfgs if isinstance(cfg, T5Config)]
    pooled = [cfg.vector_width for cfg in cfgs if not isinstance(cfg, T5Config)]
    dit = model.dit
    if (words, sum(pooled)) != ([dit.text_width], dit.pooled_width):
        raise ValueError(
            f"T5 makes features of width {words}, CLIP vectors of {pooled}; the "
            f"transformer reads features of {[dit.text_width]} and vectors of "
            f"{dit.pooled_width}; give the text encoders of the same model"
        )
