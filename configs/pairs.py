# SPDX-License-Identifier: Apache-2.0
r"""Bouncing pairs: 17 frames of 64x64 or 64x96 pixels, two objects over a texture.

    pyramid-jax prepare --pairs --clips=24000 --frames=33 \
        --model=pyramid_jax/assets/pairs --to=data/pair_latents
    pyramid-jax train --config=pairs:gpu --workdir=runs/pairs

The latents are those of configs/pairs_vae.py: 5 frames of 16x16 cells with 16 channels.
Three stages of 4x4, 8x8 and 16x16 cells, patches of 2x2 cells: a frame is 4, 16 or 64
tokens.

The model that ships saw 24,000 scenes, 33 frames long, on one H200: 5,260 and 10,840
steps (105 and 217 seconds) of 64 rows by Muon, with cosines from 2e-3 and 1.2e-3 to
1e-5 and less, and an average with decay 0.999. Its rows were packed once and stayed in
memory, as `gpu` keeps them. `full` is for a CPU, where a run takes days.
"""

from typing import Any

from configs import base, tiny


def get_config(mode: str = "full") -> Any:
    """The config; `gpu` fills one, `smoke` is a minute on a laptop."""
    cfg = tiny.get_config()
    cfg.model.dit.update(width=192, heads=6, text_width=192, pooled_width=192)
    cfg.model.dit.update(single_blocks=5, patch_values=2 * 2 * 16)
    cfg.model.dit.update(position_table=12, position_table_base=12)
    cfg.model.layout.update(patch=2, position_table=12)
    cfg.model.latent.update(channels=16, spatial=4, temporal=4)
    cfg.model.tokenizer = "pyramid_jax/assets/pairs/tokenizer.json"
    cfg.autoencoder = "pyramid_jax/assets/pairs"
    cfg.data.update(
        manifest="data/pair_latents/manifest.jsonl",
        height=64,
        width=64,
        sizes=((64, 96),),
        frames=33,
        batch=8,
        tokens=256,
        text_tokens=96,
        segments=8,
        stage_shares=(1, 2, 1),
        cache_mib=2048,
    )
    cfg.optimizer.steps = 10_000
    cfg.loop.update(steps=10_000, save_every=250, sample_every=1000)
    cfg.sample.update(first_steps=(10, 10, 10), video_steps=(6, 6, 6))
    cfg.sample.guidance.update(first=4.5, video=2.0)
    cfg.prompts = (
        "a red circle moves sideways while a blue seven goes up and down",
        "a yellow star and a magenta digit three both bounce diagonally",
        "a green handwritten 5 moves vertically, a cyan ring goes left and right",
        "a cyan box that bounces off all four walls and a red two that moves sideways",
    )
    if mode == "smoke":  # which has pixels instead of latents
        cfg.data.manifest = "data/pairs/manifest.jsonl"
        cfg.model.dit.position_table = cfg.model.layout.position_table = 16
    if mode == "gpu":
        gpu(cfg)
        mode = "full"
    cfg = base.choose(cfg, mode)
    cfg.model.text.vocabulary = 512
    if mode == "full":
        cfg.model.text.update(width=192, heads=3)
        with cfg.unlocked():
            cfg.model.text.blocks = 2
    return cfg


def gpu(cfg: Any) -> None:
    """Muon on many rows, which are made once: a GPU is faster than those who pack."""
    cfg.machine = "h200x1"
    cfg.data.update(batch=64, kept=800, workers=12)
    cfg.model.dit.remat = "everything"
    cfg.optimizer.update(kind="muon", learning_rate=2e-3, final_rate=1e-5)
    cfg.optimizer.update(steps=16_000, warmup_steps=100)
    cfg.step.ema_decay = 0.999
    cfg.loop.update(steps=16_000, log_every=200, save_every=2000, sample_every=0)
