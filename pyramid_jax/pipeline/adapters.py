# SPDX-License-Identifier: Apache-2.0
"""Adapters of a transformer: from files into its weights, and into files."""

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pyramid_jax import lora
from pyramid_jax.checkpoint import adapters, dit_tables
from pyramid_jax.checkpoint.adapters import FRONTS
from pyramid_jax.checkpoint.dit_tables import Table
from pyramid_jax.checkpoint.files import Place
from pyramid_jax.checkpoint.tensors import file_metadata
from pyramid_jax.models.dit import DiTConfig, initialise_dit
from pyramid_jax.models.layers import position_table

SAMPLE = "pyramid_jax_sample"  # how a file says what to sample with, a JSON object
INSIDE_DIT = "dit/"  # of a model's weights, before the names of the transformer's


def dit_table(cfg: DiTConfig) -> Table:
    """The names that the original gives to the weights of a transformer."""
    if not cfg.text_ends_early:
        return dit_tables.flux_table(cfg.single_blocks)
    side = cfg.position_table or cfg.position_table_base
    axis = position_table(side, cfg.position_table_base, cfg.width)
    return dit_tables.mmdit_table(cfg.double_blocks, axis)


def merged_into(
    cfg: DiTConfig, place: Place, file: str | Path, strength: float
) -> Place:
    """A `Place` that adds the adapters of a file to a model's weights first.

    Raises:
        ValueError: there is no such file, or its adapters are of another network.
    """
    read = adapters.read_adapters(file)
    changes = adapters.weight_changes(read, dit_table(cfg), _shapes(cfg))

    def merge(path: str, x: np.ndarray) -> Any:
        if change := changes.get(path.removeprefix(INSIDE_DIT)):
            x = (np.float32(x) + strength * change()).astype(x.dtype)
        return place(path, x)

    return merge


def sampling(file: str | Path) -> dict[str, Any] | None:
    """What a file of adapters says about sampling: a student's steps, for example."""
    text = file_metadata(file).get(SAMPLE)
    return None if text is None else json.loads(text)


def save_difference(
    path: str | Path, cfg: DiTConfig, difference: Any, sample: dict[str, Any]
) -> None:
    """Writes what turns one transformer into another one that was trained from it.

    Args:
        difference: of their weights, as numpy arrays.
        sample: how the other one is sampled, which the file says, too.
    """
    table, notes = dit_table(cfg), {SAMPLE: json.dumps(sample)}
    adapters.write_differences(path, difference, table, FRONTS["comfyui"], notes)


def save_adapters(folder: Path, cfg: DiTConfig, trained: Any, scale: float) -> Path:
    """Writes adapters as lora.safetensors, and as ComfyUI names them beside it.

    Args:
        trained: a tree of numpy arrays as `lora.fresh_adapters` makes it.
    """
    names = lora.DOWN, lora.UP
    table, shapes = dit_table(cfg), _shapes(cfg)
    layers = adapters.layer_adapters(trained, scale, names, table, shapes)
    whole, other = folder / "lora.safetensors", folder / "lora_comfyui.safetensors"
    adapters.write_adapters(other, layers, FRONTS["comfyui"])
    adapters.write_adapters(whole, layers, FRONTS["diffusers"])
    return whole


@lru_cache
def _shapes(cfg: DiTConfig) -> Any:
    return jax.eval_shape(partial(initialise_dit, cfg), jax.random.key(0))
