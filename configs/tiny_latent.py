# SPDX-License-Identifier: Apache-2.0
r"""The second embedded model: the clips in the latent space of configs/tiny_vae.py.

    pyramid-jax prepare --latents --model=pyramid_jax/assets/tiny_latent \
        --manifest=data/shapes/manifest.jsonl --to=data/shape_latents \
        --sizes=32x32 --frames=7 --fps=8
    pyramid-jax train --config=tiny_latent --workdir=runs/tiny_latent
    pyramid-jax train --config=tiny_latent --workdir=runs/tiny_latent2 \
        --start=runs/tiny_latent/model --config.optimizer.learning_rate=8e-4 \
        --config.optimizer.warmup_steps=20 --config.optimizer.steps=900 \
        --config.loop.steps=900 --config.seed=1 --config.data.seed=1
    pyramid-jax train --config=tiny_latent --workdir=runs/tiny_latent3 \
        --start=runs/tiny_latent2/model --config.optimizer.learning_rate=1e-3 \
        --config.optimizer.warmup_steps=20 --config.optimizer.final_rate=1e-5 \
        --config.optimizer.steps=3300 --config.loop.steps=3300 --config.seed=2 \
        --config.data.seed=2

The model that ships with the package is the result of the three runs; the first was
ended (Ctrl-C) at step 1851. They took 35 and 8 minutes on two shared cores, 43 on one.
Two stages of 4x4 and 8x8 latent cells, patches of 2x2 cells: a frame is 4 or 16 tokens.
"""

from typing import Any

from configs import base, tiny


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is a minute on a laptop."""
    cfg = tiny.get_config()
    with cfg.unlocked():
        cfg.model.update(edges=(0.0, 0.5, 1.0))
    cfg.model.dit.update(
        patch_values=2 * 2 * 8, position_table=4, position_table_base=4
    )
    cfg.model.layout.update(patch=2, position_table=4)
    cfg.model.latent.update(channels=8, spatial=4, temporal=2)
    cfg.autoencoder = "pyramid_jax/assets/tiny_latent"
    cfg.data.update(
        manifest="data/shape_latents/manifest.jsonl",
        frames=7,
        batch=16,
        tokens=128,
        text_tokens=40,
        stage_shares=(1, 2),
    )
    cfg.optimizer.update(steps=4000)
    cfg.loop.update(steps=4000)
    cfg.sample.update(first_steps=(10, 10), video_steps=(6, 6))
    cfg.sample.guidance.first = 2.0
    if mode == "smoke":  # which has pixels instead of latents
        cfg.data.manifest = "data/shapes/manifest.jsonl"
        cfg.model.dit.position_table = cfg.model.layout.position_table = 16
    return base.choose(cfg, mode)
