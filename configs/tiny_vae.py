# SPDX-License-Identifier: Apache-2.0
r"""The embedded VAE: clips of 32x32 pixels and 7 frames to 4 latent frames of 8x8x8.

    pyramid-jax prepare --embedded --to=data/shapes       # 3000 mp4 files
    pyramid-jax train-vae --config=tiny_vae --workdir=runs/tiny_vae
    pyramid-jax train-vae --config=tiny_vae --workdir=runs/tiny_vae2 \
        --start=runs/tiny_vae/model --config.optimizer.steps=2200 \
        --config.loop.steps=2200 --config.seed=1 --config.data.seed=1

The VAE that ships with the package is the result of both runs, about 11 and 16 minutes
on two shared CPU cores: 30.6 dB PSNR on the held-out clips.
"""

from typing import Any

from configs import vae


def get_config(mode: str = "full") -> Any:
    """The config; `smoke` is a minute on a laptop."""
    cfg = vae.get_config()
    cfg.machine = "cpu"
    cfg.vae.update(latent=8, groups=2, dtype="float32", remat=False)
    for part in ("encoder", "decoder"):
        cfg.vae.update({f"{part}_widths": (16, 32, 32)})
        cfg.vae.update({f"{part}_layers": (1, 1, 1)})
    cfg.vae.update(spatial=(True, True, False), temporal=(False, True, False))
    cfg.objective.update(pixel=10.0, perceptual=0.0, kl=1e-6, discriminator="none")
    cfg.data.update(
        manifest="data/shapes/manifest.jsonl",
        height=32,
        width=32,
        frames=7,
        fps=8.0,
        batch=4,
        images=0,
        windows=2,
        held_out=150,
        workers=0,
    )
    cfg.optimizer.update(
        learning_rate=2e-3,
        b2=0.99,
        weight_decay=1e-4,
        warmup_steps=50,
        steps=1500,
        final_rate=2e-5,
    )
    cfg.step.ema_decay = 0.99
    cfg.loop.update(steps=1500, log_every=20, save_every=250, sample_every=250)
    cfg.statistics = 512
    return vae.choose(cfg, mode)
