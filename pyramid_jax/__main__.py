# SPDX-License-Identifier: Apache-2.0
"""The command `pyramid-jax`, which runs the programs of launch/ by name.

A wheel holds launch/ and configs/ in a folder inside the package, so that installing it
adds no packages with such general names; in a checkout they are beside the package.
"""

import ast
import runpy
import sys
from pathlib import Path

from pyramid_jax import __version__

COMMANDS = (
    *("demo", "sample", "web", "train", "lora", "distill", "train-vae", "prepare"),
    *("convert", "reconstruct", "evaluate", "compare", "memory", "parity", "compile"),
)
_PACKAGE = Path(__file__).resolve().parent
_INSIDE = _PACKAGE / "_programs"
PROGRAMS = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent


def main() -> None:
    """Runs the command that the first argument names with the other arguments.

    Its modules are imported as if they were run from a checkout, also by the processes
    that it starts.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        sys.stdout.write(overview())
        return
    if name == "--version":
        sys.stdout.write(f"pyramid-jax {__version__}\n")
        return
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.exit(f"pyramid-jax: there is no command {name!r}; use one of {known}")
    sys.path.insert(0, str(PROGRAMS))
    sys.argv[1:] = arguments
    runpy.run_module(_module(name), run_name="__main__", alter_sys=True)


def overview() -> str:
    """What `pyramid-jax --help` prints: every command with what it does."""
    lines = [f"  {name:<12} {_summary(name)}\n" for name in COMMANDS]
    return (
        "Pyramid Flow in JAX: makes videos, and trains what makes them.\n\n"
        f"Commands:\n{''.join(lines)}\n"
        "`pyramid-jax COMMAND --help` shows the options of a command.\n"
    )


def _module(command: str) -> str:
    return f"launch.{command.replace('-', '_')}"


def _summary(command: str) -> str:
    """The first line of a program's docstring; nothing is imported."""
    path = PROGRAMS / _module(command).replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


if __name__ == "__main__":
    main()
