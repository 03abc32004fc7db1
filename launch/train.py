# SPDX-License-Identifier: Apache-2.0
"""Trains a model, or continues a training run.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny
python -m launch.train --config=configs/tiny.py:smoke --workdir=runs/smoke
python -m launch.train --config=configs/tiny.py --workdir=runs/a --config.mesh.tensor=2
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import start
from pyramid_jax.train import train

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
SECONDS = flags.DEFINE_float("max_seconds", None, "save and end after so much time")
START = flags.DEFINE_string("start", None, "folder of a trained model to start from")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the processes of a cluster")
flags.mark_flag_as_required("config")


def run(train: Callable[[Any, str, str | None], Path], _: flags.FlagValues) -> None:
    """Calls `train` with the config, the work directory and the start of the flags."""
    start.check_writable(WORKDIR.value)
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    cfg = CONFIG.value
    if SECONDS.value:
        with cfg.unlocked():
            cfg.loop.max_seconds = SECONDS.value
    model = train(cfg, WORKDIR.value, START.value)
    if jax.process_index() == 0:
        print(f"the model is in {model}")


if __name__ == "__main__":
    start.run(partial(run, train))
