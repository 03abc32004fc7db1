# SPDX-License-Identifier: Apache-2.0
"""README and docs as programs see them: blocks, commands, and what runs these."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.house.sources import INSTALLED, ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
]
README = DOCUMENTS[0]
SAMPLE, OWN_MODELS = ROOT / "docs" / "sample.md", ROOT / "docs" / "own_models.md"
# Folders of models that are not here: converted from released ones, or trained.
CONVERTED, TRAINED = "models/", "runs/"
PYTHON = re.compile(r"(?:taskset -c \d+ )?(?:\.venv/bin/)?python -m ")
CONSOLE = re.compile(r"pyramid-jax (?=\w)")


class Block(NamedTuple):
    """Text between fences, or indented; `language` is what stands behind the fence."""

    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    """The blocks of a document, top to bottom."""
    fences = re.split(r"^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    every = []
    for i, text in enumerate(fences):
        if i % 2:
            language, _, text = text.partition("\n")
            every.append(Block(language, text))
        else:
            indented = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
            every += [Block("", textwrap.dedent(text)) for text in indented]
    return every


def commands(document: Path) -> list[str]:
    """Command lines, each whole, with what it reads if that is written out (`<<`)."""
    lines: list[str] = []
    for block in blocks(document):
        rest = iter(block.text.replace("\\\n", " ").splitlines())
        for line in rest if block.language in ("", "sh") else ():
            if "<<'END'" in line:
                line = "\n".join([line, *iter(rest.__next__, "END"), "END"])
            if block.language or is_command(line):
                lines.append(line)
    return lines


def is_command(line: str) -> bool:
    return bool(program(line)) or line.startswith("make ")


def program(line: str) -> re.Match[str] | None:
    """What stands before the name of a program of this project."""
    return PYTHON.match(line) or CONSOLE.match(line)


def words(command: str) -> list[str]:
    """The module and the flags of a command that runs a module; else nothing."""
    match = program(command)
    parts = shlex.split(command[match.end() :], comments=True) if match else []
    if CONSOLE.match(command):
        parts[0] = f"launch.{parts[0].replace('-', '_')}"
    return parts


def run(
    lines: Sequence[str],
    folder: Path,
    *,
    python: Path = Path(sys.executable),
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Runs commands one after the other; returns what they print.

    Args:
        folder: where they run; this checkout is there, too.
        python: the interpreter that stands for the installed command.
        more: variables of the environment.
    """
    script = "\n".join(
        CONSOLE.sub(f"{python} -m pyramid_jax ", line, count=1) for line in lines
    )
    for name in INSTALLED:
        (folder / name).symlink_to(ROOT / name)
    one_device = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    ours = python == Path(sys.executable)  # others may have a compiler of other flags
    environment = {
        **os.environ,
        "XLA_FLAGS": one_device if ours else "",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests"),
        **more,
    }
    process = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
