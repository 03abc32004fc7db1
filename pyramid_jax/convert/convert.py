# SPDX-License-Identifier: Apache-2.0
"""Converts released models to folders that `pyramid_jax.load` reads, and back.

    config.json  weights.safetensors  vae/  text_encoder/  tokenizer/  ...  original/

Text encoders keep the names that other libraries know; `original/` keeps the config
files of transformer and VAE for the way back. Tensors are read and written one
parameter at a time.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np

from pyramid_jax.checkpoint import files, rename
from pyramid_jax.checkpoint.tensors import finite_values, subset, write_tensors
from pyramid_jax.config import asset_path, build
from pyramid_jax.convert import configs, source
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import (
    SampleConfig,
    initialise,
    model_config,
    model_section,
)
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline.adapters import (
    INSIDE_DIT,
    merged_into,
    sampling,
    save_difference,
)
from pyramid_jax.vae import autoencoder

ORIGINAL = "original"  # our folder with their config files; their name of the variant
# Height, width and longest number of frames that the original's variants make.
LANDSCAPE = (768, 1280)
SIZES = {
    "diffusion_transformer_384p": ((384, 640, 121),),
    "diffusion_transformer_768p": ((*LANDSCAPE, 241),),
    "diffusion_transformer_image": ((1024, 1024, 1), (*LANDSCAPE, 1), (1280, 768, 1)),
}
ROUNDING = 1e-3  # weights that are the same may have been stored in float16
# The names that the libraries of the original look for.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def convert_model(
    release: source.ReleasedFolder, to: str | Path
) -> source.ReleasedModel:
    """Writes a released model as a folder of this package; returns what it was.

    Raises:
        ValueError: listing everything that is wrong with the model, before anything is
            written; or `to` holds something already.
    """
    released = source.open_released(release)
    problems = [*released.problems]
    for network in released.networks.values():
        constants = rename.constant_problems(network.tensors, tensor_table(network.cfg))
        problems += [f"{network.name}: {problem}" for problem in constants]
    if problems:
        raise ValueError(
            f"{release.folder} can't be converted:\n  " + "\n  ".join(problems)
        )
    with _whole_folder(to) as part:
        _write_model(released, release.folder, part)
    return released


def _write_model(released: source.ReleasedModel, folder: Path, to: Path) -> None:
    assert released.model is not None
    dit, vae, *encoders = released.networks.values()
    _write(dit, to / files.WEIGHTS, "dit/")
    _write(vae, to / autoencoder.INSIDE / files.WEIGHTS)
    assert isinstance(vae.cfg, VAEConfig)
    sections = autoencoder.vae_sections(vae.cfg, released.model.latent)
    files.write_config(to / autoencoder.INSIDE, sections)
    for encoder in encoders:
        tensors = encoder.tensors
        values = ((name, finite_values(name, x)) for name, x in tensors.items())
        write_tensors(to / encoder.name / TRANSFORMERS, tensors, values)
        for file in (folder / encoder.name).glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, to / encoder.name / file.name)
        tokenizer = encoder.name.replace("text_encoder", "tokenizer")
        shutil.copytree(folder / tokenizer, to / tokenizer)
    for network in (dit, vae):
        original = to / ORIGINAL / network.name / files.CONFIG
        original.parent.mkdir(parents=True)
        shutil.copyfile(folder / network.name / files.CONFIG, original)
    sections = {
        "model": model_section(released.model),
        "sample": dataclasses.asdict(recommended_sampling(dit.name)),
        ORIGINAL: dit.name,
    }
    files.write_config(to, sections)


def export_model(folder: str | Path, to: str | Path) -> None:
    """Writes a folder of this package as one of the original, config files included.

    A model that was trained here becomes `diffusion_transformer` with config files made
    for it; one that was converted gets its own files back.

    Raises:
        ValueError: a file is missing or damaged, the original has no such model, or
            `to` holds something already.
    """
    with _whole_folder(to) as part:
        _export_model(Path(folder), part)


def merge_model(
    folder: str | Path, lora: Mapping[str | Path, float], to: str | Path
) -> None:
    """Writes a folder of this package again, with adapters added to its weights.

    Args:
        lora: files of adapters, and how strongly each is added.

    Raises:
        ValueError: a file is missing or damaged, the adapters are those of another
            model, or `to` holds something already.
    """
    folder = Path(folder)
    sections = files.read_config(folder, "a model", "model", "sample")
    model = model_config(sections["model"])
    abstract = jax.eval_shape(partial(initialise, model), jax.random.key(0))
    weights = files.open_weights(folder, abstract)
    place: files.Place = _kept
    for file, strength in lora.items():
        place = merged_into(model.dit, place, file, strength)
        sections["sample"] = sampling(file) or sections["sample"]
    merged = ((name, place(name, np.asarray(x))) for name, x in weights.items())
    with _whole_folder(to) as part:
        beside = (path for path in folder.iterdir() if path.name != files.WEIGHTS)
        for path in beside:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, part / path.name)
        write_tensors(part / files.WEIGHTS, weights, merged)
        files.write_config(part, sections)


def save_changes(folder: str | Path, base: str | Path, to: str | Path) -> None:
    """Writes a file of adapters that turns another model into that of a folder.

    Args:
        base: folder of the model that it was trained from.

    Raises:
        ValueError: a file is missing or damaged, the two are no models of one config,
            or differ in more than their transformers.
    """
    folder = Path(folder)
    sections = files.read_config(folder, "a model", "model", "sample")
    model = model_config(sections["model"])
    abstract = jax.eval_shape(partial(initialise, model), jax.random.key(0))
    ours, theirs = (
        files.open_weights(path, abstract) for path in (folder, asset_path(base))
    )
    change = {
        name: np.asarray(x, np.float32) - np.asarray(theirs[name], np.float32)
        for name, x in ours.items()
    }
    others = [name for name in change if not name.startswith(INSIDE_DIT)]
    if changed := [name for name in others if np.abs(change[name]).max() > ROUNDING]:
        raise ValueError(
            f"{folder} and {base} differ in {changed[0]}, and adapters change the "
            "transformer alone; give the model that this one was trained from"
        )
    difference = subset(change, INSIDE_DIT)
    save_difference(to, model.dit, difference, sections["sample"])


def _kept(_: str, x: np.ndarray) -> np.ndarray:
    return x


def _export_model(folder: Path, to: Path) -> None:
    inside = folder / autoencoder.INSIDE
    sections = files.read_config(folder, "a model", "model")
    model = model_config(sections["model"])
    if model.text is not None:
        raise ValueError(
            f"{folder} holds a model with a text encoder of its own, which the "
            "original does not have; export models that read features of T5 and CLIP"
        )
    vae = build(VAEConfig, files.read_config(inside, "a VAE", "vae")["vae"])
    fields = configs.dit_fields(vars(model.dit), vars(model.layout))
    weights = files.open_weights(folder, {"dit": abstract_weights(model.dit)})
    of_vae = files.open_weights(inside, abstract_weights(vae))
    dit_name = sections.get(ORIGINAL, source.DIT)
    for name, cfg, config, params in (
        (dit_name, model.dit, fields, subset(weights, "dit/")),
        (source.VAE, vae, configs.vae_fields(vars(vae)), of_vae),
    ):
        table = tensor_table(cfg)
        specs = rename.tensor_specs(params, table)
        tensors = rename.export_tensors(params, table)
        write_tensors(to / name / DIFFUSERS, specs, tensors)
        original = folder / ORIGINAL / name / files.CONFIG
        if original.is_file():
            shutil.copyfile(original, to / name / files.CONFIG)
        else:
            files.write_config(to / name, config)
    for pattern in ("text_encoder*", "tokenizer*"):
        for part in folder.glob(f"{pattern}/"):
            shutil.copytree(part, to / part.name)


def recommended_sampling(variant: str) -> SampleConfig:
    """What the original's models can make, and how it recommends to sample them."""
    sizes = SIZES.get(variant, ())
    images = bool(sizes) and all(frames == 1 for *_, frames in sizes)
    guidance = Guidance(first=9.0 if images else 7.0)
    return SampleConfig(guidance=guidance, image_guidance=4.0, sizes=sizes)


def _write(network: source.ReleasedNetwork, path: Path, start: str = "") -> None:
    """The parameters of a network, with the types of the tensors that they are from."""
    cfg, tensors = network.cfg, network.tensors
    table = tensor_table(cfg)
    specs = rename.parameter_specs(abstract_weights(cfg), table, tensors)
    params = rename.converted_parameters(tensors, table, specs)
    named = {f"{start}{name}": spec for name, spec in specs.items()}
    write_tensors(path, named, ((f"{start}{name}", x) for name, x in params))


@contextmanager
def _whole_folder(to: str | Path) -> Iterator[Path]:
    """A folder to write to, which becomes `to` if nothing goes wrong, else nothing."""
    to = Path(to)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} holds something already; give a new folder to write to")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as folder:
        (part := Path(folder) / to.name).mkdir()
        yield part
        part.replace(to)
