# SPDX-License-Identifier: Apache-2.0
r"""The released VAE, trained from scratch: 17 frames of 256x256, then long clips.

    pyramid-jax train-vae --config=vae --workdir=runs/vae \
        --config.data.manifest=data/videos/manifest.jsonl \
        --config.lpips.path=weights/vgg_lpips.pth
    pyramid-jax train-vae --config=vae:long --workdir=runs/vae_long \
        --start=runs/vae/model (and the same two options)
    pyramid-jax train-vae --config=vae:smoke --workdir=runs/smoke

335 million parameters, 8x8x8 pixels per latent cell, 16 channels. The original trained
on 32 A100 for about three days, on WebVid-10M and 6.9 million pictures of SAM. Its
discriminator was never switched on; here it joins half-way. `long` has 33 frames whose
time is divided over the `context` axis of the mesh (each device then holds 16, and the
first frame), clips only. Nobody has run the full size. On eight A100 (79 GiB each) a
step is predicted to hold 30 GiB and to take 1.2 s, one of `long` 48 GiB and 2.3 s
(docs/latents.md). launch.parity proves that losses and gradients are the original's.
LPIPS needs its weights (`lpips.path`), or `objective.perceptual` is 0. `smoke` needs
the clips of `launch.prepare --embedded --to=data/shapes`.
"""

from dataclasses import asdict
from typing import Any

from ml_collections import ConfigDict

from pyramid_jax.models.discriminator import DiscriminatorConfig
from pyramid_jax.models.vae import VAEConfig


def get_config(mode: str = "full") -> Any:
    """The config; `long` is the second stage, `smoke` is a minute on a laptop."""
    cfg: Any = ConfigDict()  # its entries are set here, so no type knows them
    # models.vae.VAEConfig
    cfg.vae = asdict(VAEConfig()) | {"dtype": "bfloat16", "remat": True}
    judge = asdict(DiscriminatorConfig()) | {"dtype": "bfloat16"}
    judge.pop("kind")  # objective.discriminator says it
    cfg.discriminator = judge  # models.discriminator.DiscriminatorConfig
    # models.lpips.LPIPSConfig, and the file of its weights
    widths = (64, 128, 256, 512, 512)
    cfg.lpips = {"widths": widths, "dtype": "bfloat16", "path": ""}
    cfg.objective = {  # vae.objective.ObjectiveConfig
        "pixel": 10.0,
        "perceptual": 1.0,
        "kl": 1e-12,
        "adversarial": 0.5,
        "discriminator": "2d",
        "discriminator_start": 100_000,
        "adversarial_loss": "hinge",
    }
    cfg.image_share = 0.1  # weight of images in the loss
    cfg.freeze_encoder = False
    cfg.data = {  # vae.clips.VAEDataConfig
        "manifest": "",
        "height": 256,
        "width": 256,
        "frames": 17,
        "fps": 24.0,
        "batch": 16,
        "images": 16,
        "windows": 64,
        "held_out": 64,
        "seed": 0,
        "workers": 8,
        "cache_mib": 512,
        "max_bad": 0.01,
    }
    rates = {  # training.optimizer.OptimizerConfig
        "kind": "adamw",
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-3,
        "clip": 1.0,
        "schedule": "cosine",
        "warmup_steps": 2000,
        "warmup_from": 0.0,
        "steps": 200_000,
        "final_rate": 1e-5,
    }
    cfg.optimizer, cfg.discriminator_optimizer = dict(rates), dict(rates)
    cfg.step = {"accumulate": 1, "ema_decay": 0.9999}  # training.step.StepConfig
    cfg.machine = "a100x8"  # the paper's GPUs
    cfg.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)  # sharding.device_mesh
    every = dict(log_every=50, save_every=1000, sample_every=5000)
    cfg.loop = {"steps": 200_000} | every  # training.loop.LoopConfig
    cfg.statistics = 1024  # clips over which the latents' mean and deviation are taken
    cfg.seed = 42
    return choose(cfg.lock(), mode)


def choose(cfg: Any, mode: str) -> Any:
    """The config itself for "full", or one of its other modes."""
    if mode == "long":
        cfg.data.update(frames=33, images=0)
        cfg.mesh.context = 2
    elif mode == "smoke":
        smoke(cfg)
    elif mode != "full":
        raise ValueError(f"unknown mode {mode!r}; use 'full', 'long' or 'smoke'")
    return cfg


def smoke(cfg: Any) -> None:
    """Everything small: 32x32 pixels, 5 frames, both networks from the first step."""
    cfg.vae.update(latent=4, groups=4, dtype="float32", remat=False)
    for part in ("encoder", "decoder"):
        cfg.vae.update({f"{part}_widths": (4, 8), f"{part}_layers": (1, 1)})
    cfg.vae.update(spatial=(True, False), temporal=(True, False))
    cfg.discriminator.update(width=4, layers=2, dtype="float32")
    cfg.objective.update(perceptual=0.0, kl=1e-6, discriminator_start=1)
    cfg.data.update(height=32, width=32, frames=5, fps=8.0, batch=8, images=8)
    cfg.data.update(windows=2, held_out=8, workers=0)
    cfg.data.manifest = cfg.data.manifest or "data/shapes/manifest.jsonl"
    cfg.optimizer.warmup_steps = cfg.discriminator_optimizer.warmup_steps = 1
    cfg.loop.update(steps=2, log_every=1, save_every=2, sample_every=2)
    cfg.statistics = 8
