# SPDX-License-Identifier: Apache-2.0
"""What commands have in common: the compile cache, and devices from flags."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pyramid_jax import sharding

logger = logging.getLogger(__name__)

CACHES = "XDG_CACHE_HOME"  # the variable that names the folder of all caches


def enable() -> None:
    """Keeps compiled programs from now on, in ~/.cache/pyramid_jax/programs.

    For commands: importing the package changes nothing. What the user has decided
    stays: a folder (JAX_COMPILATION_CACHE_DIR, or JAX's config), or no cache at all
    (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    given: Any = jax.config
    if given.jax_compilation_cache_dir or not given.jax_enable_compilation_cache:
        return
    caches = os.environ.get(CACHES) or os.path.expanduser("~/.cache")
    folder = Path(caches) / "pyramid_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    logger.info("compiled programs are kept in %s", folder)


def parse_mesh(given: Sequence[str] | None) -> Mesh | None:
    """Devices from texts such as "data=2"; None: the first device.

    Raises:
        ValueError: no such axis or size, or another number of devices.
    """
    if given is None:
        return None
    sizes = {}
    for text in given:
        axis, _, size = text.partition("=")
        if axis not in sharding.MESH_AXES or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"mesh {text!r} is not AXIS=SIZE with an axis of {sharding.MESH_AXES}; "
                "give e.g. data=2,fsdp=-1"
            )
        sizes[axis] = int(size)
    return sharding.device_mesh(**sizes)
