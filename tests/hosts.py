# SPDX-License-Identifier: Apache-2.0
"""Processes that join each other, as on several hosts."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.conftest import ROOT

# What joins the others; a script goes on with `rank`, `count` and its own arguments.
JOIN = """
import sys, jax
address, rank, count, devices, *arguments = sys.argv[1:]
rank, count = int(rank), int(count)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(devices))
if count > 1:
    jax.distributed.initialize(
        address, num_processes=count, process_id=rank, heartbeat_timeout_seconds=10
    )
"""
# perf: most of their time is compiling.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def started(
    script: str, count: int, *arguments: Any, devices: int = 1, flags: str = FLAGS
) -> list[subprocess.Popen[str]]:
    """Starts `count` processes of a script that begins where they have joined."""
    address = free_address()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", JOIN + script, address, str(rank), str(count)),
                *map(str, (devices, *arguments)),
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def ended(
    processes: Sequence[subprocess.Popen[str]], timeout: float = 3600
) -> list[tuple[int, str]]:
    """The exit codes and what was said, once all have ended; none is left behind."""
    deadline = time.monotonic() + timeout
    try:
        said = [
            process.communicate(timeout=deadline - time.monotonic())[0]
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def run(
    script: str, count: int, *arguments: Any, devices: int = 1, flags: str = FLAGS
) -> list[str]:
    """What the processes of a script said, which must not fail."""
    results = ended(started(script, count, *arguments, devices=devices, flags=flags))
    failed = [text[-3000:] for code, text in results if code]
    assert not failed, "\n\n".join(failed)
    return [text for _, text in results]
