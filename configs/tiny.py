# SPDX-License-Identifier: Apache-2.0
r"""The embedded model: 32x32 pixels, 8 frames, "a red circle moves left".

    pyramid-jax prepare --embedded --to=data/shapes       # 3000 mp4 files
    pyramid-jax train --config=tiny --workdir=runs/tiny
    pyramid-jax train --config=tiny:finish --workdir=runs/tiny2 \
        --start=runs/tiny/model
    pyramid-jax train --config=tiny:finish --workdir=runs/tiny3 \
        --start=runs/tiny2/model --config.optimizer.learning_rate=7e-4 \
        --config.optimizer.steps=4000 --config.loop.steps=4000 --config.seed=2 \
        --config.data.seed=2

The model that ships with the package is the result of the three runs, about 50, 18 and
35 minutes on two shared CPU cores; docs/models.md has its measured accuracy. Three
stages of 8, 16 and 32 pixels, patches of 4x4 pixels; the latents are the pixels
themselves.
"""

from typing import Any

from configs import base


def get_config(mode: str = "full") -> Any:
    """The config; `finish` continues its model, `smoke` is a minute on a laptop."""
    cfg = base.get_config("miniflux")
    describe(cfg.model)
    with cfg.unlocked():
        cfg.model.text = {"vocabulary": 384, "width": 128, "heads": 2, "blocks": 1}
    cfg.data.update(
        manifest="data/shapes/manifest.jsonl",
        height=32,
        width=32,
        frames=8,
        fps=8.0,
        batch=12,
        tokens=168,
        text_tokens=28,
        segments=8,
        stage_shares=(2, 2, 1),
        workers=0,
    )
    cfg.optimizer.update(
        learning_rate=1.5e-3,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=100,
        steps=7000,
        final_rate=3e-5,
    )
    cfg.step.ema_decay = 0.998
    cfg.loop.update(steps=7000, log_every=20, save_every=300, sample_every=2000)
    cfg.sample.update(first_steps=(8, 8, 8), video_steps=(5, 5, 5), last_step=False)
    cfg.sample.guidance.update(first=4.0, video=2.0)
    cfg.sample.image_guidance = 2.0
    cfg.prompts = (
        "a red circle moves left",
        "a green triangle moves up",
        "a cyan star moves right",
        "a magenta ring moves down",
    )
    return finish(cfg) if mode == "finish" else base.choose(cfg, mode)


def finish(cfg: Any) -> Any:
    """A second, shorter run with more of the middle stage, where shapes form."""
    cfg.optimizer.update(learning_rate=1e-3, final_rate=1e-5, steps=2600)
    cfg.data.update(stage_shares=(1, 3, 1), seed=1)
    cfg.loop.update(steps=2600, sample_every=0)
    cfg.seed = 1
    return cfg


def describe(model: Any) -> None:
    """The model: miniFLUX blocks, positions also from a table, pixels as latents."""
    model.dit.update(
        width=128,
        heads=4,
        double_blocks=1,
        single_blocks=4,
        patch_values=4 * 4 * 3,
        text_width=128,
        pooled_width=128,
        rope_axes=(8, 12, 12),
        position_table=8,
        position_table_base=8,
        dtype="float32",
        remat="products",
    )
    model.layout.update(patch=4, position_table=8)
    mean, scale = -0.72, 2.5  # of the embedded clips, measured
    model.latent.update(channels=3, spatial=1, temporal=1)
    model.latent.update(image_shift=mean, image_scale=scale)
    model.latent.update(video_shift=mean, video_scale=scale)
    model.tokenizer = "pyramid_jax/assets/tiny/tokenizer.json"
