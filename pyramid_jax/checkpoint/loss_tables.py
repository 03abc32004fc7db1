# SPDX-License-Identifier: Apache-2.0
"""The weights of the networks that only VAE training needs: LPIPS, discriminators."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from pyramid_jax.checkpoint import rename
from pyramid_jax.checkpoint.dit_tables import Constant, Rule, Table, linear_rules
from pyramid_jax.checkpoint.tensors import read_tensors

# The convolutions of each slice of VGG16, by their numbers in the original's lists.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
Colours = tuple[float, float, float]
# Where `vgg_lpips.pth` comes from: the features, and the weights of their channels.
FEATURES = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
    "vgg.pth"
)


def lpips_table(shift: Colours, scale: Colours) -> Table:
    """The table of LPIPS, whose file also holds the `shift` and `scale` of colours."""
    rules = [
        rule
        for i, numbers in enumerate(SLICES)
        for j, number in enumerate(numbers)
        for rule in linear_rules(
            f"net.slice{i + 1}.{number}", f"slices_{i}_{j}", "conv2d"
        )
    ]
    for i in range(len(SLICES)):
        head = f"lin{i}.model.1.weight"
        rules.append(Rule((head,), (f"head_{i}",), "channel_weights"))
    colours = {"shift": _colours(shift), "scale": _colours(scale)}
    return Table(
        tuple(rules), {f"scaling_layer.{name}": x for name, x in colours.items()}
    )


def discriminator_table(convolutions: int, kind: str) -> Table:
    """The table of a discriminator, whose convolutions are of a kind "2d" or "3d"."""
    # Between two convolutions of the original stand a norm and an activation.
    numbers = [0, *range(2, 3 * convolutions - 1, 3)]
    rules = [
        rule
        for i, number in enumerate(numbers)
        for rule in linear_rules(f"main.{number}", f"layer_{i}", f"conv{kind}")
    ]
    return Table(tuple(rules))


def read_lpips(path: str | Path | None, table: Table, abstract: Any) -> Any:
    """The weights of LPIPS, shaped like `abstract`, from their public files.

    Args:
        path: `vgg_lpips.pth` as the original uses it, the same as .safetensors, or a
            folder with the two files that it consists of: VGG16 of torchvision, and the
            LPIPS weights of its channels.

    Raises:
        ValueError: no path, no such file (saying where to get them), or other contents.
    """
    if path is None or not Path(path).exists():
        raise ValueError(
            f"the perceptual loss needs the weights of LPIPS, not found at {path}. "
            f"Download {FEATURES} and {HEADS} into one folder and give its path, or "
            "that of a `vgg_lpips.pth` that holds both; or set the perceptual weight "
            "to 0 and train without them"
        )
    return rename.convert_tensors(
        _one_layout(read_tensors(path), table), table, abstract
    )


def _one_layout(tensors: Mapping[str, Any], table: Table) -> Mapping[str, Any]:
    """The tensors by the names of `vgg_lpips.pth`, renaming those of VGG16."""
    if not any(key.startswith("features.") for key in tensors):
        return tensors
    renamed: dict[str, Any] = {
        key: constant.value() for key, constant in table.constants.items()
    }
    slices = {str(n): i + 1 for i, numbers in enumerate(SLICES) for n in numbers}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "features":
            number = rest.split(".")[0]
            renamed[f"net.slice{slices.get(number)}.{rest}"] = tensor
        elif part != "classifier":
            renamed[key] = tensor
    return renamed


def _colours(values: Colours) -> Constant:
    stored = rearrange(np.asarray(values, np.float32), "c -> 1 c 1 1")
    return Constant(stored.shape, lambda: stored)
