# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept on disk, so that only the first run compiles them."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

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
