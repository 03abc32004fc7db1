# SPDX-License-Identifier: Apache-2.0
"""Training of a VAE from a config: data, networks, optimizers and loop put together."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from pyramid_jax import sharding
from pyramid_jax.checkpoint import loss_tables
from pyramid_jax.config import build
from pyramid_jax.data.pictures import write_contact_sheet
from pyramid_jax.data.video_io import to_model, to_uint8, write_video
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import lpips, vae
from pyramid_jax.models.discriminator import DiscriminatorConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.training.loop import Sample, on_devices
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate
from pyramid_jax.training.run import Task, run, with_weights
from pyramid_jax.training.state import TrainState
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae import networks as vae_task
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.clips import Footage, Part, VAEDataConfig, batches
from pyramid_jax.vae.networks import VAENetworks
from pyramid_jax.vae.objective import ObjectiveConfig
from pyramid_jax.vae.quality import psnr, ssim

SHOWN = 4  # clips of a sample


def train_vae(cfg: Any, workdir: str | Path, start: str | Path | None = None) -> Path:
    """Trains as a config says, or continues what `workdir` holds; returns the model.

    The folder gets checkpoints/, samples/ with reconstructions, metrics.jsonl with PSNR
    and SSIM of held-out clips, loss.png, skipped.jsonl if files were unusable, and in
    model/ the moving average, with the measured statistics of its latents, for
    `autoencoder.load_autoencoder`.

    Args:
        start: folder of a VAE whose weights a new run starts from.

    Raises:
        ValueError: a section of the config is wrong, the weights of LPIPS are missing,
            or `workdir` or `start` is of another config.
    """
    workdir, made = Path(workdir), networks(cfg)
    data = build(VAEDataConfig, cfg.data.to_dict())
    _check(cfg, made, data)
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    judge_rates = build(OptimizerConfig, cfg.discriminator_optimizer.to_dict())
    task = Task(
        init=partial(vae_task.initialise, made),
        loss=partial(vae_task.loss, made),
        optimizer=vae_task.optimizers(made, rates, judge_rates),
        rate=learning_rate(rates),
        batches=footage(data, workdir, "training"),
        sample=evaluator(workdir, made.vae, data),
        prepare=partial(prepare, made, cfg.lpips.path, start),
    )
    ema = run(cfg, workdir, task).ema["vae"]
    latent = statistics(made.vae, ema, data, workdir, cfg.statistics)
    weights = sharding.to_host(ema)
    if jax.process_index() == 0:
        autoencoder.save_autoencoder(
            workdir / "model", Autoencoder(made.vae, latent, weights)
        )
    return workdir / "model"


def networks(cfg: Any) -> VAENetworks:
    """The networks and the objective of a config."""
    objective = build(ObjectiveConfig, cfg.objective.to_dict())
    kind = "3d" if objective.discriminator == "3d" else "2d"
    about_lpips = cfg.lpips.to_dict()
    about_lpips.pop("path")
    return VAENetworks(
        build(VAEConfig, cfg.vae.to_dict()),
        objective,
        build(DiscriminatorConfig, cfg.discriminator.to_dict() | {"kind": kind}),
        build(lpips.LPIPSConfig, about_lpips),
        cfg.image_share,
        cfg.freeze_encoder,
    )


def prepare(
    made: VAENetworks, path: str, start: str | Path | None, new: TrainState
) -> TrainState:
    """A new state with the weights of LPIPS and those that the run starts from.

    Raises:
        ValueError: there are no such weights, or they are of another config.
    """
    if made.perceived:
        table = loss_tables.lpips_table(lpips.SHIFT, lpips.SCALE)
        shapes = lpips.shapes(made.lpips)
        read = loss_tables.read_lpips(path or None, table, shapes)
        new = with_weights(new, {"perceptual": read})
    if start is not None:
        there = autoencoder.load_autoencoder(start)
        if there.cfg != made.vae:
            raise ValueError(
                f"the VAE in {start} is of another config than this run's; train with "
                "the `vae` section that it was made with"
            )
        new = with_weights(new, {"vae": there.params})
    return new


def footage(
    data: VAEDataConfig, workdir: Path, part: Part
) -> grain.DatasetIterator[Footage]:
    """This process's share of the clips."""
    shard = (jax.process_index(), jax.process_count())
    return batches(data, workdir, shard, part)


class Reconstruction(NamedTuple):
    """Clips after encoder and decoder, and how close they are, means over frames."""

    pixels: Float[jax.Array, "b f h w 3"]
    psnr: Float[jax.Array, ""]
    ssim: Float[jax.Array, ""]


@partial(jax.jit, static_argnames="cfg")
def reconstruct(
    cfg: VAEConfig, params: Any, pixels: UInt8[jax.Array, "b f h w 3"]
) -> Reconstruction:
    """What the VAE makes of clips without noise, compared with them."""
    video = to_model(pixels)
    raw, _ = vae.encode(cfg, params, video)
    made = vae.decode(cfg, params, vae.moments(raw).mode())[0].clip(-1, 1)
    return Reconstruction(made, psnr(video, made).mean(), ssim(video, made).mean())


def evaluator(workdir: Path, cfg: VAEConfig, data: VAEDataConfig) -> Sample:
    """A function (step, weights) that reconstructs the held-out clips.

    It writes samples/STEP, and returns PSNR (in decibels) and SSIM; without held-out
    clips, those of one batch of training clips.
    """
    part: Part = "held out" if data.held_out else "training"

    def evaluate(step: int, params: Any) -> dict[str, float]:
        found = []
        for batch in taken(data, workdir, part, max(1, data.held_out)):
            out = reconstruct(cfg, params["vae"], on_mesh(batch.video, params))
            found.append([float(out.psnr), float(out.ssim)])
            if len(found) == 1:
                made = to_uint8(sharding.to_host(out.pixels))
                show(workdir / "samples" / f"{step:07}", batch.video, made, data.fps)
        means = np.mean(found, axis=0)
        return {"psnr": float(means[0]), "ssim": float(means[1])}

    return evaluate


def statistics(
    cfg: VAEConfig, params: Any, data: VAEDataConfig, workdir: Path, clips: int
) -> LatentConfig:
    """Mean and deviation of first and later latent frames, over some training clips.

    Of the latents as they are drawn, so the posterior's own variance counts too.
    """

    @jax.jit
    def totals(params: Any, pixels: jax.Array) -> Float[jax.Array, "2 2"]:
        raw, _ = vae.encode(cfg, params, to_model(pixels))
        m = vae.moments(raw)
        powers = [m.mean, jnp.square(m.mean) + jnp.square(m.deviation)]
        first = jnp.stack([x[:, 0].mean() for x in powers])
        later = jnp.stack([x[:, 1:].mean() for x in powers])
        return jnp.stack([first, later if raw.shape[1] > 1 else first])

    found = [
        np.asarray(totals(params, on_mesh(batch.video, params)), np.float64)
        for batch in taken(data, workdir, "training", clips)
    ]
    mean, square = np.mean(found, axis=0).T
    scale = 1 / np.sqrt(square - mean**2)
    return LatentConfig(
        channels=cfg.latent,
        spatial=cfg.spatial_factor,
        temporal=cfg.temporal_factor,
        image_shift=float(mean[0]),
        image_scale=float(scale[0]),
        video_shift=float(mean[1]),
        video_scale=float(scale[1]),
    )


def taken(
    data: VAEDataConfig, workdir: Path, part: Part, clips: int
) -> Iterator[Footage]:
    """The first batches of a part, about so many clips over all processes."""
    count = max(1, clips // (data.batch * jax.process_count()))
    source = footage(data, workdir, part)
    try:
        for _ in range(count):
            yield next(source)
    finally:
        source.close()


def on_mesh(pixels: UInt8[np.ndarray, "b f h w 3"], params: Any) -> jax.Array:
    """Clips of all processes on the devices of the weights."""
    return on_devices(pixels, jax.tree.leaves(params)[0].sharding.mesh)


def show(
    folder: Path,
    real: UInt8[np.ndarray, "b f h w 3"],
    made: UInt8[np.ndarray, "b f h w 3"],
    fps: float,
) -> None:
    """Writes clips and their reconstructions below (picture) and beside each other."""
    if jax.process_index() > 0:
        return
    pairs = list(zip(real, made, strict=False))[:SHOWN]
    rows = [video for pair in pairs for video in pair]
    captions = ["clip", "reconstruction"] * len(pairs)
    write_contact_sheet(folder / "contact_sheet.png", rows, captions)
    for i, pair in enumerate(pairs):
        write_video(folder / f"{i}.mp4", np.concatenate(pair, axis=2), fps)


def _check(cfg: Any, made: VAENetworks, data: VAEDataConfig) -> None:
    """What the sections must agree on.

    Raises:
        ValueError: the clips don't fit the VAE, or the discriminator never starts.
    """
    every, side = made.vae.temporal_factor, made.vae.spatial_factor
    if (data.frames - 1) % every:
        below = 1 + (data.frames - 1) // every * every
        raise ValueError(
            f"clips of {data.frames} frames are not 1 + a multiple of {every}, which "
            f"this VAE needs; use {below} or {below + every} frames"
        )
    if data.height % side or data.width % side:
        raise ValueError(
            f"clips of {data.height}x{data.width} pixels are not multiples of {side}, "
            "which this VAE needs; change height and width"
        )
    start, steps = made.objective.discriminator_start, cfg.optimizer.steps
    if made.judged and start >= steps:
        raise ValueError(
            f"the discriminator starts at step {start}, but the learning rate ends at "
            f"step {steps}, so it would never train; lower discriminator_start, or "
            "use no discriminator"
        )
