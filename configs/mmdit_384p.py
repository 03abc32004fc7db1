# SPDX-License-Identifier: Apache-2.0
r"""SD3 style, 384x640, 57 and then 121 frames (2 and 5 s): paper stage 2.

    pyramid-jax prepare --text --model=models/sd3_384p \
        --manifest=data/videos/manifest.jsonl --to=data/text
    pyramid-jax prepare --latents --model=models/sd3_384p \
        --manifest=data/text/manifest.jsonl --to=data/latents_384p \
        --sizes=384x640 --frames=121 --fps=24
    pyramid-jax train --config=mmdit_384p:short --workdir=runs/mmdit_2s \
        --config.data.manifest=data/latents_384p/manifest.jsonl \
        --config.autoencoder=models/sd3_384p --start=runs/mmdit_image/model
    pyramid-jax train --config=mmdit_384p --workdir=runs/mmdit_384p \
        --config.data.manifest=data/latents_384p/manifest.jsonl \
        --config.autoencoder=models/sd3_384p --start=runs/mmdit_2s/model
    pyramid-jax train --config=mmdit_384p:smoke --workdir=runs/smoke

The first two commands store features of captions and latents of videos, made by the
text encoders and the VAE of a released model (see launch.convert); a VAE of your own
(configs/vae.py) does as well. `--config.data.images=data/images_384p/manifest.jsonl`
makes an eighth of the examples images. Training divides weights, their average and the
optimizer's moments, 30 GiB in float32, over all devices of a host.
Nobody has run the full size; launch.parity proves that loss and gradients are the
original's. `smoke` needs the clips of `launch.prepare --embedded --to=data/shapes`.
"""

from typing import Any

from configs import base


def get_config(mode: str = "full") -> Any:
    """The config; `short` comes before it, `smoke` is a minute on a laptop."""
    cfg = base.get_config("mmdit")
    cfg.data.update(height=384, width=640, frames=121, tokens=4224, batch=8)
    base.beside_images(cfg)
    cfg.optimizer.update(learning_rate=1e-4, steps=120_000)
    if mode == "short":
        cfg.data.frames, cfg.optimizer.steps, mode = 57, 80_000, "full"
    cfg.loop.steps = cfg.optimizer.steps
    cfg.machine = "h200x8"
    cfg.mesh.update(data=1, fsdp=-1)
    return base.choose(cfg, mode)
