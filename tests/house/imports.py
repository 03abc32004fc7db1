# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. `MAY_IMPORT` is the map of the package, from the ground up."""

import sys
from collections.abc import Iterator, Sequence

from tests.house.sources import (
    INSTALLED,
    PACKAGE,
    Source,
    breach,
    each_file,
    inside,
    part_graph,
)

# What each part of the package may import from the package. Every row names only rows
# above it, and only what some file of the part needs.
# fmt: off
MAY_IMPORT: dict[str, set[str]] = {
    # Vocabulary: arrays, devices, dataclasses.
    "shapes": set(),
    "sharding": set(),
    "config": set(),
    "programs": set(),
    "lora": {"sharding", "config"},
    # The method: no flax, no files.
    "mask": {"shapes"},
    "pyramid": {"shapes"},
    "latents": {"shapes"},
    "layout": {"shapes", "pyramid"},
    "objective": {"shapes", "pyramid"},
    "noise": {"shapes", "pyramid"},
    "guidance": set(),
    "units": {"shapes", "pyramid", "layout"},
    "sampler": {"shapes", "pyramid", "layout", "noise", "units"},
    "reflow": {"shapes", "config", "pyramid", "objective", "guidance"},
    # Networks.
    "kernels": {"shapes", "sharding", "programs", "mask"},
    "models": {"shapes", "sharding", "lora", "mask", "latents", "kernels"},
    # Services: none knows a network.
    "data": {"shapes", "config", "mask", "pyramid", "latents", "layout"},
    "checkpoint": {"sharding"},
    "training": {"shapes", "sharding", "config", "programs", "checkpoint"},
    # What a model is; then the wings: the VAE, videos, a run, the original's folders.
    "model": {"shapes", "config", "pyramid", "latents", "layout", "objective",
              "guidance", "units", "models"},
    "flops": {"shapes", "mask", "layout", "models", "model"},
    "vae": {"shapes", "sharding", "config", "programs", "latents", "kernels", "models",
            "data", "checkpoint", "training"},
    "pipeline": {"shapes", "sharding", "config", "programs", "lora", "noise", "units",
                 "sampler", "kernels", "models", "data", "checkpoint", "model", "vae"},
    "train": {"shapes", "sharding", "config", "latents", "data", "training", "model",
              "flops", "vae", "pipeline"},
    "distill": {"shapes", "config", "objective", "guidance", "reflow", "data",
                "training", "model", "train"},
    "finetune": {"shapes", "sharding", "config", "lora", "objective", "models",
                 "checkpoint", "training", "model", "pipeline", "train"},
    "convert": {"config", "layout", "guidance", "models", "checkpoint",
                "model", "vae", "pipeline"},
    "__init__": {"model", "pipeline"},
    # The console command runs launch/ by name; it imports nothing.
    "__main__": set(),
}
# fmt: on

# The files that a newcomer reads as mathematics need nothing else.
METHOD = {"shapes", "pyramid", "layout", "mask", "latents", "objective", "noise"}
METHOD |= {"guidance", "units", "sampler"}
METHOD_LIBRARIES = {"jax", "numpy", "einops", "jaxtyping", PACKAGE}
# Weights live in flax's modules, networks in models/; sharding unpacks boxed weights.
MAY_IMPORT_FLAX_MODULES = {"models", "sharding"}


@each_file
def imports_follow_the_table(source: Source) -> Iterator[str]:
    if any(name.startswith(".") for name in source.imports()):
        yield "relative import; write the full path"
    if source.in_package:
        if source.part not in MAY_IMPORT:
            yield f"{source.part} is not in MAY_IMPORT; say there what it may import"
            return
        for part in sorted(source.imported_parts() - MAY_IMPORT[source.part]):
            if part in MAY_IMPORT:
                yield f"{source.part} must not import {part}"


def permissions_are_used(files: Sequence[Source]) -> Iterator[str]:
    for part, imports in part_graph(files).items():
        if unused := MAY_IMPORT.get(part, set()) - imports:
            yield f"MAY_IMPORT[{part!r}]: no file needs {sorted(unused)}; drop them"


@each_file
def what_is_installed_imports_only_that(source: Source) -> Iterator[str]:
    above = {"tests", "benchmarks"}
    if source.in_package:
        above |= set(INSTALLED) - {PACKAGE}
    if source.folder in INSTALLED:
        for name in source.imports():
            if name.split(".")[0] in above:
                yield f"{source.folder} must not know {name}"


@each_file
def method_files_need_few_libraries(source: Source) -> Iterator[str]:
    if source.in_package and source.part in METHOD:
        libraries = {name.split(".")[0] for name in source.imports()}
        for library in libraries - METHOD_LIBRARIES - sys.stdlib_module_names:
            yield f"{source.part} must not need {library}"


@each_file
def only_networks_are_flax_modules(source: Source) -> Iterator[str]:
    if source.in_package and source.part not in MAY_IMPORT_FLAX_MODULES:
        for name in source.imports():
            if f"{name}.".startswith(("flax.linen.", "flax.nnx.")):
                yield f"{source.part} must not import {name}; networks are in models/"


BREACHES = [
    breach(
        imports_follow_the_table,
        inside("pyramid"),
        "from pyramid_jax.models import dit",
    ),
    breach(
        imports_follow_the_table, inside("data/rows"), "from pyramid_jax import vae"
    ),
    breach(
        imports_follow_the_table, inside("sampler"), "import pyramid_jax.models.dit"
    ),
    breach(imports_follow_the_table, inside("models/dit"), "from .layers import dense"),
    breach(imports_follow_the_table, inside("misc"), ""),
    breach(permissions_are_used, inside("layout"), "from pyramid_jax import shapes"),
    breach(
        what_is_installed_imports_only_that,
        inside("training/loop"),
        "from configs import base",
    ),
    breach(
        what_is_installed_imports_only_that,
        "launch/train.py",
        "from tests.packed import LAYOUT",
    ),
    breach(method_files_need_few_libraries, inside("mask"), "from flax import linen"),
    breach(
        only_networks_are_flax_modules,
        inside("vae/networks"),
        "import flax.linen as nn",
    ),
]
