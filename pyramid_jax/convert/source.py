# SPDX-License-Identifier: Apache-2.0
"""Folders of released models: what is in them, and all that is wrong with them.

    diffusion_transformer_384p/  causal_video_vae/  text_encoder/  tokenizer/  ...

One folder per network, with a config.json and weights: safetensors, or files of
PyTorch. The SD3-style model has three text encoders, miniFLUX two. Names, types and
shapes come from the headers of files: looking at a folder reads no weights.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyramid_jax.checkpoint import rename, text_tables
from pyramid_jax.checkpoint.tensors import read_tensors, subset
from pyramid_jax.convert import configs, networks
from pyramid_jax.convert.networks import Blueprint
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import ModelConfig
from pyramid_jax.models.dit import DiTConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.prompts import EncoderConfig

DIT, VAE = "diffusion_transformer", "causal_video_vae"
CONFIG = "config.json"
DTYPE = "bfloat16"  # in which the released models run
Make = Callable[[Mapping[str, Any]], Blueprint]  # from a config.json


@dataclass(frozen=True)
class ReleasedFolder:
    """Where a released model is.

    Args:
        variant: the folder of the transformer; None: the only one there is.
        dit, vae: files or folders with other weights for these two, such as checkpoints
            of the original's training; None: those of the folder.
        text: text encoders and tokenizers are wanted, too.
    """

    folder: Path
    variant: str | None = None
    dit: Path | None = None
    vae: Path | None = None
    text: bool = True


class Part(NamedTuple):
    """One network: its folder's name, its config.json, what that means, its tensors."""

    name: str
    given: Mapping[str, Any]
    blueprint: Blueprint
    tensors: Mapping[str, Any]

    def __str__(self) -> str:
        values = sum(int(np.prod(x.shape)) for x in self.tensors.values())
        types = ", ".join(sorted({str(x.dtype) for x in self.tensors.values()}))
        count = len(self.tensors)
        return f"{self.name:<28} {count:>5} tensors {values:>15,} values  {types}"


class Opened(NamedTuple):
    """The networks of a folder by name, and all problems; without any, the model."""

    parts: Mapping[str, Part]
    problems: list[str]
    model: ModelConfig | None

    def __str__(self) -> str:
        verdict = f"{len(self.problems)} problems:" if self.problems else "all fits"
        lines = [*map(str, self.parts.values()), verdict]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


def look(source: ReleasedFolder) -> Opened:
    """Everything that the folder of a released model should hold, checked."""
    reader = _Reader(source.folder)
    name = reader.attempt("", _variant, source)
    dit = None
    if name is not None:
        dit = reader.part(name, _dit, source.dit, "dit.")
    vae = reader.part(VAE, _vae, source.vae, "vae.")
    encoders = []
    for end in _ends(source.folder, dit) if source.text else ():
        encoder = reader.part(f"text_encoder{end}", networks.text_encoder)
        encoders.append(encoder)
        if encoder is not None:
            cfg, place = encoder.blueprint.cfg, source.folder / f"tokenizer{end}"
            reader.attempt(place.name, prompts.load_tokenizer, place, cfg)
    model = None
    if dit is not None and vae is not None:
        model = reader.attempt(dit.name, _model, dit, vae)
    if model is not None and encoders and all(encoders):
        reader.attempt("text encoders", _check_widths, model, encoders)
    return Opened(reader.parts, reader.problems, None if reader.problems else model)


class _Reader:
    """Opens parts of a folder, and notes what is wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: dict[str, Part] = {}
        self.problems: list[str] = []

    def attempt(self, name: str, f: Callable[..., Any], *args: Any) -> Any:
        """What `f` returns; None, and one more problem, if it raises a ValueError."""
        try:
            return f(*args)
        except ValueError as error:
            self.problems.append(f"{name}: {error}".removeprefix(": "))
            return None

    def part(
        self, name: str, make: Make, weights: Path | None = None, start: str = ""
    ) -> Part | None:
        """The network in a folder, or None; its tensors may come from elsewhere.

        Args:
            start: of the names of its tensors, see `subset`.
        """
        if not (self.folder / name).is_dir():
            self.problems.append(f"{name}: this folder is missing")
            return None
        given = self.attempt(name, _fields, self.folder / name / CONFIG)
        tensors = self.attempt(name, read_tensors, weights or self.folder / name)
        blueprint = None if given is None else self.attempt(name, _make, make, given)
        if given is None or blueprint is None or tensors is None:
            return None
        part = Part(name, given, blueprint, subset(tensors, start))
        shapes = text_tables.without_copies(
            {k: x.shape for k, x in part.tensors.items()}
        )
        wrong = rename.check(shapes, blueprint.table, blueprint.shapes)
        self.problems += [f"{name}: {problem}" for problem in wrong]
        self.parts[name] = part
        return part


def _variant(source: ReleasedFolder) -> str:
    there = sorted(p.name for p in source.folder.glob(f"{DIT}*") if p.is_dir())
    if source.variant is None and len(there) == 1:
        return there[0]
    if source.variant not in there:
        raise ValueError(
            f"{source.folder} has the transformers {there}, and {source.variant!r} was "
            "asked for; choose one of them as the variant"
        )
    return source.variant


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it, too")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error


def _make(make: Make, given: Mapping[str, Any]) -> Blueprint:
    try:
        return make(given)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{CONFIG} lacks or misstates {error}; copy it again"
        ) from error


def _dit(given: Mapping[str, Any]) -> Blueprint:
    return networks.dit(DiTConfig(**configs.dit_config(given).dit, dtype=DTYPE))


def _vae(given: Mapping[str, Any]) -> Blueprint:
    return networks.vae(VAEConfig(**configs.vae_config(given), dtype=DTYPE))


def _ends(folder: Path, dit: Part | None) -> list[str]:
    """What the names of the text encoders end with that the transformer reads."""
    if dit is not None and isinstance(dit.blueprint.cfg, DiTConfig):
        count = 2 if dit.blueprint.cfg.position_table is None else 3
        return list(prompts.FOLDERS[:count])
    return [end for end in prompts.FOLDERS if (folder / f"text_encoder{end}").is_dir()]


def _model(dit: Part, vae: Part) -> ModelConfig:
    """What transformer and VAE are together; ValueError if they don't fit."""
    arguments, pixels = configs.dit_config(dit.given), vae.blueprint.cfg
    assert isinstance(dit.blueprint.cfg, DiTConfig) and isinstance(pixels, VAEConfig)
    latent = LatentConfig(
        channels=pixels.latent,
        spatial=pixels.spatial_factor,
        temporal=pixels.temporal_factor,
        **arguments.latent,
    )
    return ModelConfig(dit.blueprint.cfg, Layout(**arguments.layout), latent)


def _check_widths(model: ModelConfig, encoders: list[Part]) -> None:
    """Raises ValueError unless the encoders make what the transformer reads."""
    cfgs: list[Any] = [encoder.blueprint.cfg for encoder in encoders]
    words = [cfg.width for cfg in cfgs if isinstance(cfg, T5Config)]
    pooled = [_pooled(cfg) for cfg in cfgs if not isinstance(cfg, T5Config)]
    made, wanted = (
        (words, sum(pooled)),
        ([model.dit.text_width], model.dit.pooled_width),
    )
    if made != wanted:
        raise ValueError(
            f"T5 makes features of width {words}, CLIP vectors of {pooled}; the "
            f"transformer reads features of {wanted[0]} and vectors of {wanted[1]}; "
            "give the text encoders of the same model"
        )


def _pooled(cfg: EncoderConfig) -> int:
    assert not isinstance(cfg, T5Config)
    return cfg.width if cfg.projection is None else cfg.projection
