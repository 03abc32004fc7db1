# SPDX-License-Identifier: Apache-2.0
r"""Trains a VAE, or continues a training run; the flags are those of launch.train.

python -m launch.train_vae --config=configs/tiny_vae.py --workdir=runs/tiny_vae
python -m launch.train_vae --config=configs/vae.py:smoke --workdir=runs/smoke
python -m launch.train_vae --config=configs/vae.py:long --workdir=runs/long \
    --start=runs/vae/model
"""

from functools import partial

from absl import flags

from launch import start, train
from pyramid_jax.vae.train import train_vae

if __name__ == "__main__":
    flags.adopt_module_key_flags(train)
    start.run(partial(train.run, train_vae))
