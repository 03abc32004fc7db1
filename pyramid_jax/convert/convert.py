# SPDX-License-Identifier: Apache-2.0
"""Released models into folders that `generate.load` reads, and back.

    config.json  weights.safetensors  vae/  text_encoder/  tokenizer/  ...  original/

Text encoders keep the names that other libraries know; `original/` keeps the config
files of transformer and VAE for the way back. Tensors are read and written one
parameter at a time.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyramid_jax.checkpoint import rename, trees
from pyramid_jax.checkpoint.safetensors_file import Spec, Writer
from pyramid_jax.checkpoint.tensors import subset
from pyramid_jax.config import build
from pyramid_jax.convert import configs, networks
from pyramid_jax.convert import source as original
from pyramid_jax.convert.source import CONFIG, Opened, Part, ReleasedFolder
from pyramid_jax.model import SampleConfig, model_config, model_section
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.sampler import Guidance
from pyramid_jax.sharding import unbox
from pyramid_jax.vae import autoencoder

ORIGINAL = "original"  # our folder with their config files; their name of the variant
# Height, width and longest number of frames that the original's variants make.
LANDSCAPE = (768, 1280)
SIZES = {
    "diffusion_transformer_384p": ((384, 640, 121),),
    "diffusion_transformer_768p": ((*LANDSCAPE, 241),),
    "diffusion_transformer_image": ((1024, 1024, 1), (*LANDSCAPE, 1), (1280, 768, 1)),
}
WEIGHTS = "weights.safetensors"
# The names that the libraries of the original look for.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def convert(source: ReleasedFolder, to: str | Path) -> Opened:
    """Writes a released model as a folder of this package; returns what it was.

    Raises:
        ValueError: listing everything that is wrong with the model, before anything is
            written; or `to` holds something already.
    """
    to = _empty(to)
    found = original.look(source)
    wrong = [
        f"{part.name}: {problem}"
        for part in found.parts.values()
        for problem in rename.wrong_constants(part.tensors, part.blueprint.table)
    ]
    if problems := [*found.problems, *wrong]:
        raise ValueError(
            f"{source.folder} can't be converted:\n  " + "\n  ".join(problems)
        )
    assert found.model is not None
    dit, vae, *encoders = found.parts.values()
    _write(dit, to / WEIGHTS, "dit/")
    _write(vae, to / autoencoder.INSIDE / WEIGHTS)
    about = {"vae": vae.blueprint.cfg, "latent": found.model.latent}
    about = {name: dataclasses.asdict(cfg) for name, cfg in about.items()}
    _write_json(to / autoencoder.INSIDE / CONFIG, about)
    for encoder in encoders:
        _copy(encoder.tensors, to / encoder.name / TRANSFORMERS)
        for file in (source.folder / encoder.name).glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, to / encoder.name / file.name)
        tokenizer = encoder.name.replace("text_encoder", "tokenizer")
        shutil.copytree(source.folder / tokenizer, to / tokenizer)
    for part in (dit, vae):
        kept = to / ORIGINAL / part.name / CONFIG
        kept.parent.mkdir(parents=True)
        shutil.copyfile(source.folder / part.name / CONFIG, kept)
    sections = {
        "model": model_section(found.model),
        "sample": dataclasses.asdict(recommended(dit.name)),
        ORIGINAL: dit.name,
    }
    _write_json(to / CONFIG, sections)
    return found


def export(folder: str | Path, to: str | Path) -> None:
    """Writes a folder of this package as one of the original, config files included.

    A model that was trained here becomes `diffusion_transformer` with config files made
    for it; one that was converted gets back what it had.

    Raises:
        ValueError: a file is missing or damaged, the original has no such model, or
            `to` holds something already.
    """
    folder, to = Path(folder), _empty(to)
    sections = _sections(folder)
    cfg = model_config(sections["model"])
    if cfg.text is not None:
        raise ValueError(
            f"{folder} holds a model with a text encoder of its own, which the "
            "original does not have; export models that read features of T5 and CLIP"
        )
    pixels = build(VAEConfig, _sections(folder / autoencoder.INSIDE)["vae"])
    given = [
        configs.dit_fields(vars(cfg.dit), vars(cfg.layout)),
        configs.vae_fields(vars(pixels)),
    ]
    dit, vae = networks.dit(cfg.dit), networks.vae(pixels)
    weights = trees.open_tree(folder / WEIGHTS, {"dit": unbox(dit.shapes)})
    of_vae = trees.open_tree(folder / autoencoder.INSIDE / WEIGHTS, unbox(vae.shapes))
    names = sections.get(ORIGINAL, original.DIT), original.VAE
    for name, fields, blueprint, tensors in zip(
        names, given, (dit, vae), (subset(weights, "dit/"), of_vae), strict=True
    ):
        specs = rename.specs(tensors, blueprint.table)
        with Writer(to / name / DIFFUSERS, specs) as out:
            for key, values in rename.exported(tensors, blueprint.table):
                out.write(key, values)
        kept = folder / ORIGINAL / name / CONFIG
        if kept.is_file():
            shutil.copyfile(kept, to / name / CONFIG)
        else:
            _write_json(to / name / CONFIG, fields)
    for pattern in ("text_encoder*", "tokenizer*"):
        for part in folder.glob(f"{pattern}/"):
            shutil.copytree(part, to / part.name)


def recommended(variant: str) -> SampleConfig:
    """What the original's models can make, and how it recommends to sample them."""
    sizes = SIZES.get(variant, ())
    images = bool(sizes) and all(frames == 1 for *_, frames in sizes)
    guidance = Guidance(first=9.0 if images else 7.0)
    return SampleConfig(guidance=guidance, image_guidance=4.0, sizes=sizes)


def _write(part: Part, path: Path, start: str = "") -> None:
    """The parameters of a network, with the types of the tensors that they are from."""
    table = part.blueprint.table
    specs = rename.typed(part.blueprint.shapes, table, part.tensors)
    with Writer(path, {f"{start}{name}": spec for name, spec in specs.items()}) as out:
        rename.convert(
            part.tensors, table, specs, lambda name, x: out.write(f"{start}{name}", x)
        )


def _copy(tensors: Mapping[str, Any], path: Path) -> None:
    specs = {key: Spec(x.dtype, tuple(x.shape)) for key, x in tensors.items()}
    with Writer(path, specs) as out:
        for key, x in tensors.items():
            out.write(key, np.asarray(x))


def _sections(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG}; give a folder that launch.convert or training "
            "wrote, with its VAE in it"
        )
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _write_json(path: Path, sections: Any) -> None:
    path.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


def _empty(to: str | Path) -> Path:
    to = Path(to)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} holds something already; give a new folder to write to")
    return to
