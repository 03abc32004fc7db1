# SPDX-License-Identifier: Apache-2.0
r"""SD3 style, 768x1280, 241 frames (10 s): paper stage 3.

    pyramid-jax prepare --text --model=models/sd3_768p \
        --manifest=data/videos/manifest.jsonl --to=data/text
    pyramid-jax prepare --latents --model=models/sd3_768p \
        --manifest=data/text/manifest.jsonl --to=data/latents_768p \
        --sizes=768x1280 --frames=241 --least_frames=121 --fps=24
    pyramid-jax train --config=mmdit_768p --workdir=runs/mmdit_768p \
        --config.data.manifest=data/latents_768p/manifest.jsonl \
        --config.autoencoder=models/sd3_768p --start=runs/mmdit_384p/model
    pyramid-jax train --config=mmdit_768p:smoke --workdir=runs/smoke

The first two commands store features of captions and latents of videos, made by the
text encoders and the VAE of a released model (see launch.convert); a VAE of your own
(configs/vae.py) does as well. `--config.data.images=data/images_768p/manifest.jsonl`
makes an eighth of the examples images. Training divides weights, their average and the
optimizer's moments, 30 GiB in float32, over all devices of a v5p-64.
Nobody has run the full size; launch.parity proves that loss and gradients are the
original's. `smoke` needs the clips of `launch.prepare --embedded --to=data/shapes`.
"""

from typing import Any

from configs import base


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is a minute on a laptop."""
    cfg = base.get_config("mmdit")
    cfg.data.update(height=768, width=1280, frames=241, tokens=24_064, batch=128)
    cfg.data.least_frames = 121
    base.beside_images(cfg)
    cfg.model.dit.remat = "attention"  # a tenth faster than nothing, for 5 GiB more
    cfg.data.paired = True  # each of the machine's 64 devices gets two rows
    cfg.machine = "v5p:4x4x4"
    cfg.mesh.update(data=1, fsdp=-1)
    cfg.sample.guidance.first = 9.0
    return base.choose(cfg, mode)
