# SPDX-License-Identifier: Apache-2.0
"""Pyramid Flow in JAX: text to video by flow matching on a pyramid of resolutions.

Importing the package touches no accelerator and loads no weights.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`pyramid_jax.load` is `generate.load`, imported when it is used."""
    if name == "load":
        from pyramid_jax.pipeline.video import load

        return load
    raise AttributeError(f"module {__name__} has no attribute {name}")
