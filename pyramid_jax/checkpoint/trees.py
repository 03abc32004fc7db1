# SPDX-License-Identifier: Apache-2.0
"""Weights of this package as one safetensors file, named by their path in the tree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from pyramid_jax import sharding
from pyramid_jax.checkpoint import safetensors_file
from pyramid_jax.checkpoint.safetensors_file import Spec, StoredTensor, Writer

Place = Callable[[str, np.ndarray], Any]  # (path, values) -> what the tree keeps


def write_tree(path: str | Path, tree: Any) -> None:
    """Writes a nested dict of arrays; names are like "dit/double/text/qkv/kernel"."""
    flat = {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}
    with Writer(path, {name: Spec(x.dtype, x.shape) for name, x in flat.items()}) as to:
        for name, values in flat.items():
            to.write(name, values)


def read_tree(path: str | Path, like: Any, place: Place | None = None) -> Any:
    """The nested dict in a file, whose names and shapes must be those of `like`.

    Args:
        place: what to do with each parameter, read one at a time, e.g. put it on the
            devices; None: numpy arrays.

    Raises:
        ValueError: the file is missing or damaged, or lists all names that are missing,
            unknown or of another shape.
    """
    found = open_tree(path, like)
    done = {
        name: np.asarray(x) if place is None else place(name, np.asarray(x))
        for name, x in found.items()
    }
    return unflatten_dict(done, sep="/")


def open_tree(path: str | Path, like: Any) -> dict[str, StoredTensor]:
    """The parameters of a file by path, unread; otherwise as `read_tree`."""
    found = safetensors_file.read(path)
    flat: dict[str, Any] = flatten_dict(like, sep="/")
    wanted = {name: tuple(x.shape) for name, x in flat.items()}
    problems = [f"  {name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"  {name} is unknown" for name in found.keys() - wanted.keys()]
    problems += [
        f"  {name} has shape {found[name].shape}, expected {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name]
    ]
    if problems:
        raise ValueError(
            f"{path} does not hold the model of its config.json:\n"
            + "\n".join(sorted(problems))
        )
    return found


def placing(like: Any, mesh: Mesh | None, dtype: str | None = None) -> Place:
    """Moves parameters to the devices that share them; processes copy their parts only.

    Args:
        like: the tree of parameters, in boxes that name their axes.
        mesh: the devices; None: all parameters whole on the first one.
        dtype: that the parameters get; None: they keep theirs.
    """
    where: Any = None
    if mesh is not None:
        where = flatten_dict(sharding.shardings(like, mesh), sep="/")

    def place(path: str, x: np.ndarray) -> jax.Array:
        x = x if dtype is None else x.astype(jnp.dtype(dtype), copy=False)
        if where is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, where[path], x.__getitem__)

    return place
