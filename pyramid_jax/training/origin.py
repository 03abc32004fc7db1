# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: a line of starts.jsonl for each time it is started."""

import datetime
import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

STARTS = "starts.jsonl"
LIBRARIES = (
    *("pyramid_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"),
    "numpy",
)


def write_start(folder: str | Path, cfg: Any, step: int) -> None:
    """Adds a line: time, first step, command, commit, versions, devices and config.

    Only the first process writes.
    """
    if jax.process_index() > 0:
        return
    device = jax.devices()[0]
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | versions(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "config": cfg.to_dict(),
    }
    with (Path(folder) / STARTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, default=str) + "\n")


def versions() -> dict[str, str]:
    """The installed versions of the libraries that decide what a run computes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout, with "+" if files differ; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        name = git("rev-parse", "HEAD")
        return name + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
