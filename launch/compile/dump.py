# SPDX-License-Identifier: Apache-2.0
"""What a compiler has decided on, read before it writes instructions.

XLA writes a program down once all of its operations, their order and their places in
memory are settled. That is all that a plan needs. The instructions, which then remain,
take a TPU's compiler most of its time: so a plan does not wait for them.
"""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOST = "5"  # the color of what lies in the host's memory
PAUSE = 0.2  # seconds between two looks


@contextmanager
def dumping(folder: str) -> Iterator[None]:
    """XLA writes training steps into a folder, if this process has not used it yet."""
    flags = os.environ.get("XLA_FLAGS")
    wanted = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    wanted += " --xla_dump_hlo_module_re=jit_step"
    os.environ["XLA_FLAGS"] = f"{flags or ''} {wanted}"
    try:
        yield
    finally:
        if flags is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = flags


def settled(lowered: Any, folder: Path, whole: bool) -> tuple[str, dict[str, int]]:
    """The text of a program, and its bytes on a device, as soon as they are settled.

    The compiler may go on in a thread, which only the end of the process ends.

    Args:
        folder: where `dumping` has them written.
        whole: waits for the instructions, which a compiler may refuse to write.
    """
    pool = ThreadPoolExecutor(1)
    compiling: Future[Any] = pool.submit(lowered.compile)
    while not compiling.done():
        # The last file that belongs to a text has the number of its program.
        for text in folder.glob("*after_optimizations.txt"):
            if not whole and any(folder.glob(f"{text.name[:11]}*debug_options")):
                places = text.with_name(f"{text.stem}-buffer-assignment.txt")
                return text.read_text(), allocated(places.read_text())
        time.sleep(PAUSE)
    made = compiling.result()
    return made.as_text(), bytes_of(made.memory_analysis())


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
