# SPDX-License-Identifier: Apache-2.0
"""Weights of this package as one safetensors file, named by their path in the tree."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def write_tree(path: str | Path, tree: Any) -> None:
    """Writes a nested dict of arrays; names are like "dit/double/text/qkv/kernel"."""
    flat = flatten_dict(tree, sep="/")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in flat.items()}, path)


def read_tree(path: str | Path, like: Any) -> Any:
    """The nested dict in a file, whose names and shapes must be those of `like`.

    Raises:
        ValueError: the file is missing or damaged, or lists all names that are missing,
            unknown or of another shape.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} can't be read ({error}); copy the model again"
        ) from error
    flat: dict[str, Any] = flatten_dict(like, sep="/")
    wanted = {name: x.shape for name, x in flat.items()}
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
    return unflatten_dict(found, sep="/")
