# SPDX-License-Identifier: Apache-2.0
"""Pyramid Flow in JAX: text to video by flow matching on a pyramid of resolutions.

Importing the package touches no accelerator and loads no weights: the public names are
imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramid_jax.model import SampleConfig
    from pyramid_jax.pipeline.folder import PAIRS, TINY
    from pyramid_jax.pipeline.sizes import Size
    from pyramid_jax.pipeline.video import VideoPipeline, load

__version__ = "0.2.0"

__all__ = ["PAIRS", "TINY", "SampleConfig", "Size", "VideoPipeline", "load"]

_MODULES = {
    "SampleConfig": "model",
    "Size": "pipeline.sizes",
    "PAIRS": "pipeline.folder",
    "TINY": "pipeline.folder",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = _MODULES.get(name, "pipeline.video")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
