# SPDX-License-Identifier: Apache-2.0
"""miniFLUX, images of about 1024x1024: paper stage 1.

    python -m launch.train --config=configs/flux_image.py:smoke --workdir=runs/smoke

The full size needs the latents of the causal VAE, which this version can't make yet;
until then the config says what the released model is; launch.parity proves the numbers.
"""

from typing import Any

from configs import base


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is seconds on a laptop."""
    cfg = base.get_config("miniflux")
    cfg.model.latent.update(image_shift=-0.04, image_scale=1 / 1.8726)
    cfg.data.update(height=1024, width=1024, frames=1, temporal=False)
    cfg.data.sizes = ((768, 1280), (1280, 768))
    cfg.data.update(stage_shares=(1, 1, 1), tokens=4224, batch=16)
    cfg.optimizer.update(learning_rate=1e-4, b2=0.999)
    cfg.sample.guidance.first = 9.0
    cfg.mesh.fsdp = 8
    return base.choose(cfg, mode)
