# SPDX-License-Identifier: Apache-2.0
"""Numbers of the structure: modules, rooms, imports, code lines, files per journey.

    python -m tests.house.survey                     # of this checkout
    python -m tests.house.survey ../old              # of another one
    python -m tests.house.survey . --trace launch.sample --prompt="a red circle"

A room is a part of the package (a file or a folder in it), or another folder of
programs. `--trace` runs a command, with the flags behind it, and lists the files of the
package that it calls, in the order of their first calls. What a file does while it is
imported is not counted.
"""

import argparse
import inspect
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from tests.house.sources import (
    PACKAGE,
    ROOT,
    code_lines_by_part,
    repository,
    room_graph,
)


def survey(root: Path) -> dict[str, int]:
    """What there is to count in a checkout, each with its name."""
    files = repository(root)
    package = [source for source in files if source.in_package]
    # A benchmark may borrow the tests' browser; nothing stands on them otherwise.
    rooms = {room: names - {"tests"} for room, names in room_graph(files).items()}
    return {
        "files and folders in the package": len({s.path.parts[1] for s in package}),
        "modules of the package": len(package),
        "rooms of the project": len(rooms),
        "longest chain of imports between rooms": longest_chain(rooms),
        "imports between rooms": sum(map(len, rooms.values())),
        "lines of the package": sum(len(s.text.splitlines()) for s in package),
        "code lines of the package": code_lines_by_part(files).total(),
    }


def longest_chain(graph: Mapping[str, set[str]]) -> int:
    """How many rooms the longest chain of imports has; there must be no cycle."""

    @cache
    def height(room: str) -> int:
        return 1 + max(map(height, graph[room]), default=0)

    return max(map(height, graph))


def trace(root: Path, module: str, arguments: Sequence[str]) -> list[str]:
    """The files of the package that a command calls, in the order of first calls."""
    folder = f"{root / PACKAGE}/"
    files: dict[str, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_function = event == "call" and code.co_flags & inspect.CO_NEWLOCALS
        if is_function and code.co_filename.startswith(folder):
            files[code.co_filename.removeprefix(folder)] = None

    sys.argv = [module, *arguments]
    sys.path.insert(0, str(root))
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--trace", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args()
    root = options.root.resolve()
    if options.trace:
        files = trace(root, options.trace[0], options.trace[1:])
        print("\n".join([*files, f"{len(files)} files of the package"]))
        return
    for name, number in survey(root).items():
        print(f"{number:7,}  {name}")


if __name__ == "__main__":
    main()
