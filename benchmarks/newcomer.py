# SPDX-License-Identifier: Apache-2.0
"""A newcomer's walk: what the first commands take, from a fresh clone.

    python -m benchmarks.newcomer --to benchmarks/results/newcomer.json

The repository is cloned, with what is committed, into a temporary folder, which is also
the home of all caches, so that everything is installed and compiled. Packages are
downloaded. A command that fails ends the walk.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import environment

ROOT = Path(__file__).resolve().parent.parent
PYRAMID = ".venv/bin/pyramid-jax"
SHORT = "--config.optimizer.warmup_steps=5 --config.optimizer.steps=20"
# The commands by what they are for; docs/where_to_begin.md shows them.
WALK = {
    "clone": "git clone -q $SOURCE .",
    "environment": "make setup",
    "pictures": "make demo",
    "first video": f'{PYRAMID} sample --prompt="a red circle and a blue seven"',
    "clips to train on": f"{PYRAMID} prepare --embedded --clips=288 --to=data/shapes",
    "first training, 20 steps": f"{PYRAMID} train --config=tiny --workdir=runs/first "
    f"{SHORT} --config.loop.steps=20 --config.loop.sample_every=0",
    "first check of a conversion": f"{PYRAMID} parity --cases=tests/golden "
    "--only=sd3_dit",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Walks, prints the times, and writes them where `--to` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    result: dict[str, Any] = {"environment": environment(("jax",)), "walk": {}}
    with tempfile.TemporaryDirectory() as folder:
        home, clone = Path(folder) / "home", Path(folder) / "clone"
        home.mkdir()
        clone.mkdir()
        for name, command in WALK.items():
            result["walk"][name] = {"command": command, **took(command, clone, home)}
            print(name, json.dumps(result["walk"][name]), flush=True)
            if options.to:
                text = json.dumps(result, indent=1)
                options.to.write_text(text + "\n", encoding="utf-8")


def took(command: str, folder: Path, home: Path) -> dict[str, float]:
    """Seconds of a command on the clock, and of all its processes on processors.

    Raises:
        ValueError: the command failed.
    """
    gone = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=kept | {"HOME": str(home), "SOURCE": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise ValueError(f"{command} failed: {process.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(used, 1),
    }


if __name__ == "__main__":
    main()
