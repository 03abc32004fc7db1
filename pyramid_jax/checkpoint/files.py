# SPDX-License-Identifier: Apache-2.0
"""The files of a network: config.json says what it is, and one file has the weights.

Weights are named by their path in the tree of parameters, such as
"dit/double/text/qkv/kernel".
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from pyramid_jax import sharding
from pyramid_jax.checkpoint.tensors import (
    StoredTensors,
    open_safetensors,
    write_tensors,
)

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
LAST = "/last_"  # before the name of a stack: its last layer, which stands apart
Place = Callable[[str, np.ndarray], Any]  # (path, values) -> what the tree keeps


def read_config(folder: Path, kind: str, *sections: str) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Args:
        kind: what the folder should hold, for messages, e.g. "a model".
        sections: entries that the file must have.

    Raises:
        ValueError: the file is missing, is no JSON, or lacks a section.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG} of {kind}; copy this file, too, or give a "
            "folder that has it"
        )
    try:
        config = json.loads(path.read_bytes())  # of any Unicode encoding
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error
    if missing := [name for name in sections if name not in config]:
        raise ValueError(
            f"{path} is no {CONFIG} of {kind}, it lacks {missing}; give a folder that "
            f"holds {kind}"
        )
    return config


def write_config(folder: Path, config: Any) -> None:
    """Writes a folder's config.json; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def write_weights(folder: Path, params: Any) -> None:
    """Writes a nested dict of host arrays as the weights of a folder."""
    flat = flatten_dict(params, sep="/")
    write_tensors(folder / WEIGHTS, flat, flat.items())


def read_weights(folder: Path, abstract: Any, place: Place) -> Any:
    """The weights in a folder, whose names and shapes must be those of `abstract`.

    Args:
        place: what to do with each parameter, read one at a time, e.g. `placing`.

    Raises:
        ValueError: the file is missing or damaged, or lists all names that are missing,
            unknown or of another shape.
    """
    tensors = open_weights(folder, abstract)
    params = {name: place(name, np.asarray(x)) for name, x in tensors.items()}
    return unflatten_dict(params, sep="/")


def open_weights(folder: Path, abstract: Any) -> StoredTensors:
    """The weights in a folder by path, unread; otherwise like `read_weights`."""
    flat: dict[str, Any] = flatten_dict(sharding.unbox(abstract), sep="/")
    shapes = {name: tuple(x.shape) for name, x in flat.items()}
    tensors = _last_apart(open_safetensors(folder / WEIGHTS), shapes)
    problems = [f"  {name} is missing" for name in shapes.keys() - tensors.keys()]
    problems += [f"  {name} is unknown" for name in tensors.keys() - shapes.keys()]
    problems += [
        f"  {name} has shape {tensors[name].shape}, expected {shapes[name]}"
        for name in shapes.keys() & tensors.keys()
        if tensors[name].shape != shapes[name]
    ]
    if problems:
        raise ValueError(
            f"{folder / WEIGHTS} does not hold the model of its {CONFIG}:\n"
            + "\n".join(sorted(problems))
        )
    return tensors


def _last_apart(
    tensors: StoredTensors, shapes: Mapping[str, tuple[int, ...]]
) -> StoredTensors:
    """The tensors, with last layers by themselves that older files keep in stacks."""
    apart = dict(tensors)
    for last in shapes.keys() - tensors.keys():
        stack, shape = last.replace(LAST, "/"), shapes[last]
        if LAST not in last or stack not in tensors:
            continue
        count = shapes[stack][0] if stack in shapes else 0
        whole = tensors[stack]
        if whole.shape == (count + 1, *shape):
            apart[last] = replace(whole, shape=shape, read=lambda x=whole: x.read()[-1])
            apart[stack] = replace(
                whole, shape=(count, *shape), read=lambda x=whole: x.read()[:-1]
            )
            if not count:
                del apart[stack]
    return apart


def placing(abstract: Any, mesh: Mesh | None, dtype: str | None = None) -> Place:
    """A function that moves each parameter to the devices that share it.

    Processes copy their own parts only.

    Args:
        abstract: the tree of parameters, in boxes that name their axes.
        mesh: the devices; None: all parameters whole on the first one.
        dtype: that the parameters get; None: theirs, float16 read as float32.
    """
    shardings: dict[str, Any] | None = None
    if mesh is not None:
        shardings = flatten_dict(sharding.shardings(abstract, mesh), sep="/")

    def place(path: str, x: np.ndarray) -> jax.Array:
        stored = "float32" if x.dtype == np.float16 else x.dtype
        x = x.astype(jnp.dtype(dtype or stored), copy=False)
        if shardings is None:
            return jax.device_put(x)  # `jnp.asarray` compiles a program for every shape
        return jax.make_array_from_callback(x.shape, shardings[path], x.__getitem__)

    return place
