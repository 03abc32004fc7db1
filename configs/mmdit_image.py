# SPDX-License-Identifier: Apache-2.0
r"""SD3 style, images of about 1024x1024: paper stage 1.

    pyramid-jax prepare --text --model=models/sd3_384p \
        --manifest=data/images/manifest.jsonl --to=data/text
    pyramid-jax prepare --latents --model=models/sd3_384p \
        --manifest=data/text/manifest.jsonl --to=data/latents_image \
        --sizes=1024x1024,768x1280,1280x768 --frames=1
    pyramid-jax train --config=mmdit_image --workdir=runs/mmdit_image \
        --config.data.manifest=data/latents_image/manifest.jsonl \
        --config.autoencoder=models/sd3_384p
    pyramid-jax train --config=mmdit_image:smoke --workdir=runs/smoke

The first two commands store features of captions and latents of images, made by the
text encoders and the VAE of a released model (see launch.convert), which are the same
for all sizes; a VAE of your own (configs/vae.py) does as well. The paper's model began
with the weights of SD3 Medium, this one begins with none. Training divides weights,
their average and the optimizer's moments, 30 GiB in float32, over all devices of a
host.
Nobody has run the full size; launch.parity proves that loss and gradients are the
original's. `smoke` needs the clips of `launch.prepare --embedded --to=data/shapes`.
"""

from typing import Any

from configs import base, flux_image


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is a minute on a laptop."""
    cfg = base.get_config("mmdit")
    flux_image.describe(cfg)
    return base.choose(cfg, mode)
