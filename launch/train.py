# SPDX-License-Identifier: Apache-2.0
"""Trains a model, or continues a training run.

    pyramid-jax train --config=tiny --workdir=runs/tiny
    pyramid-jax train --config=tiny:smoke --workdir=runs/smoke
    pyramid-jax train --config=mine.py --workdir=runs/mine --start=runs/tiny/model

The config says everything else: data, network, optimizer, devices, length. List all its
entries with --show_config, and set each on the command line, after --config:

    pyramid-jax train --config=tiny --show_config
    pyramid-jax train --config=tiny --workdir=runs/long --config.loop.steps=9000 \\
        --config.data.sizes="((32, 32), (32, 64))" --config.mesh.tensor=2
"""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections.config_flags import get_config_filename

from launch import start
from launch.cluster import define_cluster, join_cluster
from launch.config_flag import define_config
from launch.kinds import COMMANDS, kind
from pyramid_jax.train import train

CONFIG = define_config()
SHOW = flags.DEFINE_bool(
    "show_config", False, "Print all entries of the config as options, and end."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; what it holds already is continued."
)
START = flags.DEFINE_string(
    "start", None, "Folder of a trained model whose weights a new run starts from."
)
SECONDS = flags.DEFINE_float(
    *("max_seconds", None, "Save and end after this time, if the run is not done."),
    lower_bound=0,
)
PROFILE = flags.DEFINE_string(
    "profile", None, "FROM:TO, e.g. 10:12: write a trace of these steps to profile/."
)
define_cluster()
flags.mark_flag_as_required("config")
HEADINGS = {
    "config": "what to train",
    "workdir": "where, and from what",
    "max_seconds": "how",
    "distributed": "several hosts",
}


def run(
    train: Callable[[Any, str, str | None], Path],
    section: str,
    values: flags.FlagValues,
) -> None:
    """Calls `train` with the config, the work directory and the start of the flags.

    Raises:
        ValueError: the config is for another command, or there is no folder.
    """
    cfg = CONFIG.value
    if (trained := kind(cfg)) != section:
        name = get_config_filename(values["config"])
        raise ValueError(
            f"--config={name} is for pyramid-jax {COMMANDS[trained]}, not for "
            f"{COMMANDS[section]}"
        )
    if SHOW.value:
        print(entries(cfg))
        return
    if not WORKDIR.value:
        raise ValueError("--workdir is missing; give a folder for the run")
    start.check_writable(WORKDIR.value)
    join_cluster(values)
    if SECONDS.value:
        with cfg.unlocked():
            cfg.loop.max_seconds = SECONDS.value
    if PROFILE.value:
        with cfg.unlocked():
            cfg.loop.profile = _steps(PROFILE.value)
    model = train(cfg, WORKDIR.value, START.value)
    if jax.process_index() == 0:
        print(f"the model is in {model}")


def _steps(text: str) -> tuple[int, int]:
    """The first and the last step of a text such as "10:12".

    Raises:
        ValueError: anything else.
    """
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile={text} is not FROM:TO; give e.g. 10:12")
    return int(first), int(last)


def entries(cfg: Any) -> str:
    """All entries of a config, each as the option that sets it to what it is."""
    flat = flatten_dict(cfg.to_dict(), sep=".", keep_empty_nodes=True)
    return "\n".join(shlex.quote(f"--config.{name}={x}") for name, x in flat.items())


if __name__ == "__main__":
    start.run(partial(run, train, "model"), headings=HEADINGS)
