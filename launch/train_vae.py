# SPDX-License-Identifier: Apache-2.0
"""Trains a VAE, or continues a training run.

    pyramid-jax train-vae --config=pairs_vae --workdir=runs/pairs_vae
    pyramid-jax train-vae --config=vae:smoke --workdir=runs/smoke
    pyramid-jax train-vae --config=vae:long --workdir=runs/long --start=runs/vae/model

The config says everything else; list all its entries with --show_config, and set each
on the command line, after --config, as in --config.data.batch=8.
"""

from functools import partial

from absl import flags

from launch import cluster, start, train
from pyramid_jax.vae.train import train_vae

if __name__ == "__main__":
    for module in (train, cluster):
        flags.adopt_module_key_flags(module)
    start.run(partial(train.run, train_vae, "vae"), headings=train.HEADINGS)
