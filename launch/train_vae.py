# SPDX-License-Identifier: Apache-2.0
"""Trains a VAE, or continues a training run.

python -m launch.train_vae --config=configs/tiny_vae.py --workdir=runs/tiny_vae
python -m launch.train_vae --config=configs/vae.py:smoke --workdir=runs/smoke
python -m launch.train_vae --config=configs/vae.py:long --workdir=runs/long \
    --start=runs/vae/model
"""

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from launch import start
from pyramid_jax.vae.train import train_vae

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
SECONDS = flags.DEFINE_float("max_seconds", None, "save and end after so much time")
START = flags.DEFINE_string("start", None, "folder of a VAE to start from")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the processes of a cluster")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; see --help")
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    start.enable_compile_cache()
    cfg = CONFIG.value
    if SECONDS.value:
        with cfg.unlocked():
            cfg.loop.max_seconds = SECONDS.value
    logging.info("the VAE is in %s", train_vae(cfg, WORKDIR.value, START.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
