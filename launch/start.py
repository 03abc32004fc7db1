# SPDX-License-Identifier: Apache-2.0
"""What every command does: parse flags, keep compiled programs, say what is wrong.

    if __name__ == "__main__":
        flags.DEFINE_string("to", "runs/demo", "folder to write to")
        start.run(main)

where `main` takes the parsed flags.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from absl import app, flags
from jax.sharding import Mesh

from launch import usage
from pyramid_jax import sharding

logger = logging.getLogger(__name__)

CACHES = "XDG_CACHE_HOME"  # the variable that names the folder of all caches


def run(
    main: Callable[[flags.FlagValues], None],
    define: Callable[[flags.FlagValues], None] | None = None,
    headings: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs a command with the flags of the command line, and ends the process.

    A ValueError says what the user gave, and what to do: it is printed without a
    traceback, which `--verbosity=1` shows. The exit code is then 1.

    Args:
        main: the command.
        define: declares its flags, if they are not declared yet.
        headings: of groups of flags in the help, each by the name of its first flag.
    """
    if define is not None:
        define(flags.FLAGS)

    def command(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown arguments {arguments[1:]}; see --help")
        enable_compile_cache()
        try:
            main(flags.FLAGS)
        except ValueError as error:
            logger.debug("the command ended", exc_info=True)
            sys.exit(f"{_name()}: {error}")

    app.run(command, flags_parser=partial(usage.parse, _name(), headings))


def _name() -> str:
    """The name of the command, e.g. "pyramid-jax train-vae" of launch.train_vae."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    command = name.removeprefix("launch.")
    return name if command == name else f"pyramid-jax {command.replace('_', '-')}"


def enable_compile_cache() -> None:
    """Keeps compiled programs from now on, in ~/.cache/pyramid_jax/programs.

    For commands: importing the package changes nothing. What the user has decided
    stays: a folder (JAX_COMPILATION_CACHE_DIR, or JAX's config), or no cache at all
    (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    caches = os.environ.get(CACHES) or os.path.expanduser("~/.cache")
    folder = Path(caches) / "pyramid_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    logger.info("compiled programs are kept in %s", folder)


def parse_mesh(axes: Sequence[str] | None) -> Mesh | None:
    """Devices from texts such as "data=2"; None stands for the first device.

    Raises:
        ValueError: no such axis or size, or another number of devices.
    """
    if axes is None:
        return None
    sizes = {}
    for text in axes:
        axis, _, size = text.partition("=")
        if axis not in sharding.MESH_AXES or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"mesh {text!r} is not AXIS=SIZE with an axis of {sharding.MESH_AXES}; "
                "give e.g. data=2,fsdp=-1"
            )
        sizes[axis] = int(size)
    return sharding.device_mesh(**sizes)
