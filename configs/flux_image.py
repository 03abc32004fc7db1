# SPDX-License-Identifier: Apache-2.0
r"""miniFLUX, images of about 1024x1024: paper stage 1.

    pyramid-jax prepare --text --model=models/miniflux_image \
        --manifest=data/images/manifest.jsonl --to=data/text
    pyramid-jax prepare --latents --model=models/miniflux_image \
        --manifest=data/text/manifest.jsonl --to=data/latents_image \
        --sizes=1024x1024,768x1280,1280x768 --frames=1
    pyramid-jax train --config=flux_image --workdir=runs/flux_image \
        --config.data.manifest=data/latents_image/manifest.jsonl \
        --config.autoencoder=models/miniflux_image
    pyramid-jax train --config=flux_image:smoke --workdir=runs/smoke

The first two commands store features of captions and latents of images, made by the
text encoders and the VAE of a released model (see launch.convert); a VAE of your own
(configs/vae.py) does as well. Training divides weights, their average and the
optimizer's moments, 29 GiB in float32, over all devices of a host.
Nobody has run the full size; launch.parity proves that loss and gradients are the
original's. `smoke` needs the clips of `launch.prepare --embedded --to=data/shapes`.
"""

from typing import Any

from configs import base


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is a minute on a laptop."""
    cfg = base.get_config("miniflux")
    cfg.model.latent.update(image_shift=-0.04, image_scale=1 / 1.8726)
    describe(cfg)
    return base.choose(cfg, mode)


def describe(cfg: Any) -> None:
    """What the stage is for both variants: data, optimizer, samples, machine."""
    cfg.data.update(height=1024, width=1024, frames=1)
    cfg.data.sizes = ((768, 1280), (1280, 768))
    cfg.data.update(stage_shares=(1, 1, 1), tokens=4224, batch=16)
    cfg.optimizer.update(learning_rate=1e-4, b2=0.999)
    cfg.sample.guidance.first = 9.0
    cfg.machine = "h200x8"
    cfg.mesh.update(data=1, fsdp=-1)
