# SPDX-License-Identifier: Apache-2.0
"""Training of a VAE from a config: data, networks, optimizers and loop put together."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from pyramid_jax import sharding
from pyramid_jax.checkpoint import loss_tables
from pyramid_jax.config import build
from pyramid_jax.data.manifest import Split
from pyramid_jax.data.pictures import write_contact_sheet
from pyramid_jax.data.pixels import to_model, to_uint8
from pyramid_jax.data.video_io import write_video
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import lpips, vae
from pyramid_jax.models.discriminator import DiscriminatorConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.training.loop import Sample
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate
from pyramid_jax.training.run import run_training
from pyramid_jax.training.task import Task
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae import networks as vae_networks
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.clips import Footage, VAEDataConfig, vae_batches
from pyramid_jax.vae.networks import VAENetworks
from pyramid_jax.vae.objective import ObjectiveConfig, Scalar
from pyramid_jax.vae.quality import psnr, ssim
from pyramid_jax.vae.widening import widened

SHOWN = 4  # clips in samples/STEP


def train_vae(cfg: Any, workdir: str | Path, start: str | Path | None = None) -> Path:
    """Trains as a config says, or continues the run in `workdir`; returns the model.

    The folder gets checkpoints/, samples/ with reconstructions, metrics.jsonl with PSNR
    and SSIM of held-out clips, loss.png, skipped.jsonl if files were unusable, and in
    model/ the moving average, with the measured statistics of its latents, for
    `autoencoder.load_autoencoder`.

    Args:
        start: folder of a VAE whose weights a new run starts from. It may be narrower
            by whole factors, see `vae.widening`.

    Raises:
        ValueError: a section of the config is wrong, the weights of LPIPS are missing,
            or `workdir` or `start` is of another config.
    """
    workdir, networks = Path(workdir), build_networks(cfg)
    data = vae_data(cfg, networks)
    state = run_training(
        cfg,
        workdir,
        vae_task(cfg, networks),
        batches=partial(own_clips, data, workdir),
        sample=evaluator(workdir, networks.vae, data),
        pretrained=partial(pretrained_weights, networks, cfg.lpips.path, start),
    )
    ema = state.ema["vae"]
    latent = statistics(networks.vae, ema, data, workdir, cfg.statistics)
    weights = sharding.to_host(ema)
    if jax.process_index() == 0:
        autoencoder.save_autoencoder(
            workdir / "model", Autoencoder(networks.vae, latent, weights)
        )
    return workdir / "model"


def build_networks(cfg: Any) -> VAENetworks:
    """The networks and the objective of a config."""
    objective = build(ObjectiveConfig, cfg.objective.to_dict())
    kind = "3d" if objective.discriminator == "3d" else "2d"
    lpips_section = cfg.lpips.to_dict()
    lpips_section.pop("path")
    return VAENetworks(
        build(VAEConfig, cfg.vae.to_dict()),
        objective,
        build(DiscriminatorConfig, cfg.discriminator.to_dict() | {"kind": kind}),
        build(lpips.LPIPSConfig, lpips_section),
        cfg.image_share,
        cfg.freeze_encoder,
    )


def vae_task(cfg: Any, networks: VAENetworks) -> Task:
    """What `train_vae` trains: the autoencoder, and the discriminator if it has one."""
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    judge_rates = build(OptimizerConfig, cfg.discriminator_optimizer.to_dict())
    return Task(
        partial(vae_networks.initialise_networks, networks),
        partial(vae_networks.vae_loss, networks),
        vae_networks.optimizers(networks, rates, judge_rates),
        learning_rate(rates),
    )


def pretrained_weights(
    networks: VAENetworks, path: str, start: str | Path | None
) -> dict[str, Any]:
    """The weights of LPIPS, if they are needed, and of the VAE in the folder `start`.

    Raises:
        ValueError: there are no such weights, or they are of another config.
    """
    weights = {}
    if networks.perceived:
        table = loss_tables.lpips_table(lpips.SHIFT, lpips.SCALE)
        shapes = lpips.lpips_shapes(networks.lpips)
        weights["perceptual"] = loss_tables.read_lpips(path or None, table, shapes)
    if start is not None:
        pretrained = autoencoder.load_autoencoder(start)
        widths = {
            "encoder_widths": networks.vae.encoder_widths,
            "decoder_widths": networks.vae.decoder_widths,
        }
        if dataclasses.replace(pretrained.cfg, **widths) != networks.vae:
            raise ValueError(
                f"the VAE in {start} is of another config than this run's; train with "
                "the `vae` section that it was made with, or with larger widths"
            )
        weights["vae"] = pretrained.params
        if pretrained.cfg != networks.vae:
            init = partial(vae.initialise_vae, networks.vae)
            like = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
            weights["vae"] = widened(sharding.to_host(pretrained.params), like)
    return weights


def own_clips(
    data: VAEDataConfig, workdir: Path, mesh: Mesh, split: Split = "training"
) -> grain.DatasetIterator[Footage]:
    """Batches of the clips and pictures that this process's devices need."""
    clips, pictures = (sharding.own_rows(n, mesh) for n in (data.batch, data.images))
    return vae_batches(data, workdir, (clips, pictures), split)


def first_clips(
    params: Any, data: VAEDataConfig, workdir: Path, split: Split, clips: int
) -> Iterator[tuple[UInt8[np.ndarray, "b f h w 3"], UInt8[jax.Array, "_ f h w 3"]]]:
    """The first batches of a split, with about `clips` clips over all processes.

    Each comes as this process's clips and as all clips on the mesh of the weights.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    count = max(1, clips // data.batch)
    with closing(own_clips(data, workdir, mesh, split)) as batches:
        for batch in islice(batches, count):
            yield batch.video, sharding.global_batch(batch.video, mesh)


@partial(jax.jit, static_argnames="cfg")
def reconstruct(
    cfg: VAEConfig, params: Any, pixels: UInt8[jax.Array, "b f h w 3"]
) -> tuple[Float[jax.Array, "b f h w 3"], Scalar, Scalar]:
    """Clips after encoder and decoder, without noise, and their mean PSNR and SSIM."""
    video = to_model(pixels)
    raw, _ = vae.encode(cfg, params, video)
    result = vae.decode(cfg, params, vae.moments(raw).mean)[0].clip(-1, 1)
    return result, psnr(video, result).mean(), ssim(video, result).mean()


def evaluator(workdir: Path, cfg: VAEConfig, data: VAEDataConfig) -> Sample:
    """A function (step, weights) that reconstructs the held-out clips.

    It writes samples/STEP, and returns PSNR (in decibels) and SSIM; without held-out
    clips, those of one batch of training clips.
    """
    split: Split = "held out" if data.held_out else "training"

    def evaluate(step: int, params: Any) -> dict[str, float]:
        scores, folder = [], workdir / "samples" / f"{step:07}"
        count = max(1, data.held_out)
        for clips, video in first_clips(params, data, workdir, split, count):
            pixels, *values = reconstruct(cfg, params["vae"], video)
            if not scores:
                mesh = jax.tree.leaves(params)[0].sharding.mesh
                own = sharding.own_rows(len(pixels), mesh)
                result = to_uint8(sharding.to_host(pixels))[own]
                write_reconstructions(folder, clips, result, data.fps)
            scores.append([float(value) for value in values])
        means = np.mean(scores, axis=0).tolist()
        return dict(zip(("psnr", "ssim"), means, strict=True))

    return evaluate


def write_reconstructions(
    folder: Path,
    clips: UInt8[np.ndarray, "b f h w 3"],
    results: UInt8[np.ndarray, "b f h w 3"],
    fps: float,
) -> None:
    """Writes clips and their reconstructions below (picture) and beside each other."""
    if jax.process_index() > 0:
        return
    pairs = list(zip(clips, results, strict=False))[:SHOWN]
    rows = [video for pair in pairs for video in pair]
    captions = ["clip", "reconstruction"] * len(pairs)
    write_contact_sheet(folder / "contact_sheet.png", rows, captions)
    for i, pair in enumerate(pairs):
        write_video(folder / f"{i}.mp4", np.concatenate(pair, axis=2), fps)


def statistics(
    cfg: VAEConfig, params: Any, data: VAEDataConfig, workdir: Path, clips: int
) -> LatentConfig:
    """Mean and deviation of first and later latent frames, over some training clips.

    The latents are drawn, so the posterior's own variance counts too.
    """

    @jax.jit
    def totals(params: Any, pixels: jax.Array) -> Float[jax.Array, "2 2"]:
        raw, _ = vae.encode(cfg, params, to_model(pixels))
        m = vae.moments(raw)
        powers = [m.mean, jnp.square(m.mean) + jnp.square(m.deviation)]
        first = jnp.stack([x[:, 0].mean() for x in powers])
        later = jnp.stack([x[:, 1:].mean() for x in powers])
        return jnp.stack([first, later if raw.shape[1] > 1 else first])

    means = [
        np.asarray(totals(params, video), np.float64)
        for _, video in first_clips(params, data, workdir, "training", clips)
    ]
    mean, square = np.mean(means, axis=0).T
    scale = 1 / np.sqrt(square - mean**2)
    return dataclasses.replace(
        cfg.latents,
        image_shift=float(mean[0]),
        image_scale=float(scale[0]),
        video_shift=float(mean[1]),
        video_scale=float(scale[1]),
    )


def vae_data(cfg: Any, networks: VAENetworks) -> VAEDataConfig:
    """The `data` section, which fits the networks.

    Raises:
        ValueError: an entry is wrong, the clips don't fit the VAE, or the discriminator
            never starts.
    """
    data = build(VAEDataConfig, cfg.data.to_dict())
    networks.vae.latents.frames(data.frames)
    networks.vae.latents.grid(data.height, data.width)
    start, steps = networks.objective.discriminator_start, cfg.optimizer.steps
    if networks.judged and start >= steps:
        raise ValueError(
            f"the discriminator starts at step {start}, but the learning rate ends at "
            f"step {steps}, so it would never train; lower discriminator_start, or "
            "use no discriminator"
        )
    return data
