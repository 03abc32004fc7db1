# SPDX-License-Identifier: Apache-2.0
r"""Adapters (LoRA) of any model: a style or a subject from a few clips, on one GPU.

    pyramid-jax lora --config=lora:tiny --workdir=runs/style \
        --start=pyramid_jax/assets/tiny --config.data.manifest=data/mine/manifest.jsonl
    pyramid-jax lora --config=lora:mmdit_384p --workdir=runs/mmdit_style \
        --start=models/sd3_384p --config.data.manifest=data/latents_384p/manifest.jsonl
    pyramid-jax lora --config=lora:smoke --workdir=runs/smoke --start=TINY

What follows the colon is the config that the model was trained with: a run has its data
and its network. The base is in bfloat16, and whole on every device; with one row, the
released models are predicted to fit a GPU of 24 GB (docs/lora.md). Nobody has
fine-tuned a released model with it.
"""

from typing import Any

from configs import base


def get_config(model: str = "tiny") -> Any:
    """The config of a model's adapters; `smoke` is a minute on a laptop."""
    cfg, mode = base.named(model)
    small = cfg.model.dit.width < 512
    with cfg.unlocked():
        # pyramid_jax.lora.LoRAConfig
        cfg.lora = {
            "rank": 16,
            "alpha": 16.0,
            "targets": ("qkv", "out"),
            "base": "float32" if small else "bfloat16",
        }
    cfg.mesh.update(data=-1, fsdp=1)
    if mode == "full":
        cfg.optimizer.update(
            kind="adamw",
            learning_rate=2e-3 if small else 1e-4,
            schedule="cosine",
            warmup_steps=20,
            steps=1000,
            final_rate=1e-5,
            weight_decay=0.0,
        )
        cfg.loop.update(steps=1000, save_every=250, sample_every=250)
        cfg.step.ema_decay = 0.98
    if not small:
        cfg.data.batch = 1
        cfg.machine = "a100x1"
    return cfg
