# SPDX-License-Identifier: Apache-2.0
"""What a compiler has settled, read before it writes instructions.

XLA writes a program down once all of its operations, their order and their places in
memory are settled. That is all that a plan needs. The instructions, which then remain,
take a TPU's compiler most of its time: so it runs in a process of its own, which is
ended then.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOST = "5"  # the color of what lies in the host's memory
PAUSE = 0.2  # seconds between two looks
PLACES = "after_optimizations-buffer-assignment"
SOURCES = Path(__file__).parents[2]


def settled(arguments: Sequence[str], folder: Path) -> tuple[str, dict[str, int]]:
    """The text of a training step, and its bytes on a device, once they are settled.

    Args:
        arguments: those of this command.
        folder: gets what the compiler writes down.

    Raises:
        ValueError: it could not compile the step.
    """
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_dump_hlo_module_re=_step"
    paths = os.pathsep.join([str(SOURCES), *filter(None, [os.getenv("PYTHONPATH")])])
    log = folder / "said.txt"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.compile", *arguments, "--whole"],
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    found = None
    try:
        while process.poll() is None and not (found := _found(folder)):
            time.sleep(PAUSE)
    finally:
        process.kill()
        process.wait()
    if found := found or _found(folder):
        return found
    raise ValueError(f"the compiler gave up: {log.read_text()[-2000:]}")


def _found(folder: Path) -> tuple[str, dict[str, int]] | None:
    """The text and the bytes, if both are written to their ends."""
    for places in folder.glob(f"*{PLACES}.txt"):
        file = places.with_name(places.name.replace(PLACES, "after_optimizations"))
        text = file.read_text() if file.is_file() else ""
        if "\nENTRY " in text and text.rstrip().endswith("}"):
            return text, allocated(places.read_text())
    return None


def allocated(text: str) -> dict[str, int]:
    """The same as `bytes_of`, from the compiler's list of allocations."""
    used = dict.fromkeys(("arguments", "temporary", "results", "host"), 0)
    listed = r"^allocation \d+: size (\d+), (?:color (\d+), )?(.*)$"
    for size, color, what in re.findall(listed, text, re.MULTILINE):
        if color == HOST:
            used["host"] += int(size)
        elif not color and "thread-local" not in what:
            kind = "arguments" if "parameter" in what else "temporary"
            kind = "results" if "output shape" in what else kind
            used[kind] += int(size)
    host = used.pop("host")
    return used | {"total": sum(used.values()), "host": host}


def bytes_of(memory: Any) -> dict[str, int]:
    """A compiler's analysis of memory: what arguments, results and the rest take."""
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "results": max(0, fresh),  # those that take no argument's place
    }
    waiting = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return used | {"total": sum(used.values()), "host": waiting}
