# SPDX-License-Identifier: Apache-2.0
r"""The arms of the ablations: small models that differ in one choice of the method.

    python -m benchmarks.ablations --to=runs/ablations
    pyramid-jax train --config=ablations:images_1_stage --workdir=runs/one_stage

Bouncing pairs at 32x32 pixels, which are the latents: images, or 5 frames at 2 per
second. `python -m benchmarks.ablations` draws the data, trains every arm for the same
arithmetic, samples and measures it (docs/ablations.md); the number of steps, which
differs from arm to arm, is its business. All stages are trained equally often, as in
the paper.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from configs import base, tiny

STEPS = 24  # Euler steps of an image, or of the first frame, divided among the stages
WORDS = {"image": 11, "video": 19}  # tokens of a caption, a little over the mean


def images(cfg: Any, stages: int) -> None:
    """Images, with a spatial pyramid of so many stages; 1: plain flow matching."""
    finest, mean = 64, 64 * sum(4.0**-k for k in range(stages)) / stages
    cfg.model.edges = tuple(k / stages for k in range(stages + 1))
    steps = (STEPS // stages,) * stages
    cfg.sample.update(first_steps=steps, video_steps=steps)
    segments = round(4 * finest / mean) + 1
    cfg.data.update(frames=1, tokens=4 * finest, segments=segments)
    cfg.data.update(stage_shares=(1,) * stages, manifest="data/ablations/images.jsonl")
    cfg.data.text_tokens = segments * WORDS["image"]


def sequences(cfg: Any) -> None:
    """All frames at once, without causality."""
    cfg.model.layout.history = "none"
    cfg.model.dit.causal = False


def plain(cfg: Any) -> None:
    """Flow matching of whole videos at one resolution: no pyramid at all."""
    sequences(cfg)
    cfg.model.edges = (0.0, 1.0)
    cfg.data.stage_shares = (1,)
    cfg.sample.update(first_steps=(STEPS,), video_steps=(STEPS,))


def full_history(cfg: Any) -> None:
    """The past at the resolution of the unit's own stage."""
    cfg.model.layout.history = "full"


def bidirectional(cfg: Any) -> None:
    """The past sees the frames that are being denoised."""
    cfg.model.dit.causal = False


def corruption(cfg: Any, most: float) -> None:
    """Noise of the history in training, up to `most`."""
    cfg.model.corrupt = most


# What changes from the pyramid, by the name of the arm.
ARMS: Mapping[str, Callable[[Any], None]] = MappingProxyType(
    {
        "images_1_stage": partial(images, stages=1),
        "images_2_stages": partial(images, stages=2),
        "images_3_stages": partial(images, stages=3),
        "images_4_stages": partial(images, stages=4),
        "pyramid": lambda cfg: None,
        "sequences": sequences,
        "plain": plain,
        "full_history": full_history,
        "bidirectional": bidirectional,
        "corruption_0": partial(corruption, most=0.0),
        "corruption_1_6": partial(corruption, most=1 / 6),
        "corruption_2_3": partial(corruption, most=2 / 3),
    }
)


def get_config(mode: str = "full") -> Any:
    """The config of an arm; "full" is the pyramid, `smoke` a minute on a laptop."""
    cfg = tiny.get_config()
    mean, scale = -0.37, 3.3  # of the clips, measured
    cfg.model.latent.update(image_shift=mean, image_scale=scale)
    cfg.model.latent.update(video_shift=mean, video_scale=scale)
    cfg.model.tokenizer = "pyramid_jax/assets/pairs/tokenizer.json"
    cfg.data.update(
        manifest="data/ablations/videos.jsonl",
        frames=5,
        fps=2.0,
        batch=4,
        tokens=320,
        text_tokens=7 * WORDS["video"],
        segments=7,
        stage_shares=(1, 1, 1),
    )
    cfg.optimizer.update(warmup_steps=50, steps=1000)
    cfg.loop.update(steps=1000, save_every=1000, sample_every=0)
    cfg.step.ema_decay = 0.99
    cfg.sample.update(first_steps=(8, 8, 8), video_steps=(5, 5, 5))
    cfg.sample.guidance.update(first=3.0, video=2.0)
    cfg.prompts = ()  # samples are those of the benchmark
    if mode in ARMS:
        ARMS[mode](cfg)
    else:
        cfg = base.choose(cfg, mode)
    cfg.model.text.vocabulary = 512
    return cfg
