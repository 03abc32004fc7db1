# SPDX-License-Identifier: Apache-2.0
"""Training from a config: data, model, optimizer and loop put together."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from pyramid_jax import flops, sharding
from pyramid_jax import model as models
from pyramid_jax.config import build
from pyramid_jax.data.examples import DataConfig, LoadLatent, encoded_latent
from pyramid_jax.data.loader import batches
from pyramid_jax.data.pictures import write_contact_sheet
from pyramid_jax.data.stored import check_latents, read_records
from pyramid_jax.data.tokenizer import Tokenize, load_tokenizer
from pyramid_jax.data.video_io import write_video
from pyramid_jax.latents import LatentConfig
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.pipeline import folder, video
from pyramid_jax.pipeline.video import VideoPipeline
from pyramid_jax.shapes import Rows
from pyramid_jax.training.loop import Sample
from pyramid_jax.training.metrics import Arithmetic, RowWork
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.run import best_average, run_training
from pyramid_jax.training.state import TrainState
from pyramid_jax.training.step import Loss
from pyramid_jax.training.task import Task
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder

logger = logging.getLogger(__name__)


class Experiment(NamedTuple):
    """What a config says about a run of the DiT, read and checked."""

    model: ModelConfig
    data: DataConfig
    defaults: SampleConfig
    tokenize: Tokenize
    vae: Autoencoder | None


def train(cfg: Any, workdir: str | Path, start: str | Path | None = None) -> Path:
    """Trains as a config says, or continues the run in `workdir`; returns the model.

    The folder gets checkpoints/, samples/, the loss (metrics.jsonl, TensorBoard files,
    loss.png), starts.jsonl, skipped.jsonl if data files were unusable, and the model of
    the moving average in model/, with the VAE if there is one, for `pyramid_jax.load`;
    that of the best checkpoint in best/, if records are held out and another is last.

    Args:
        start: folder of a model whose weights a new run starts from (fine-tuning).

    Raises:
        ValueError: a section of the config is wrong, or `workdir` or `start` is of
            another config.
    """
    described = experiment(cfg)
    model = described.model
    return run_experiment(
        cfg,
        workdir,
        described,
        dit_task(cfg, model),
        pretrained=dict
        if start is None
        else partial(start_weights, model, start, True),
        arithmetic=arithmetic(model),
    )


def dit_task(cfg: Any, model: ModelConfig) -> Task:
    """What `train` trains: a DiT, and its text encoder if that is its own."""
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    init = partial(models.initialise, model)
    rule = optimizer(rates, jax.eval_shape(init, jax.random.key(0)))
    return Task(init, partial(models.training_loss, model), rule, learning_rate(rates))


def experiment(cfg: Any) -> Experiment:
    """The sections of a config, put together.

    Raises:
        ValueError: a section is wrong, or the latents are not those of the VAE.
    """
    model = models.model_config(cfg.model.to_dict())
    vae = autoencoder.load_autoencoder(cfg.autoencoder) if cfg.autoencoder else None
    if vae is not None:
        model = with_latents(model, vae.latent)
    data = data_config(cfg, model)
    if vae is not None and not data.encode:
        for manifest in filter(None, (data.manifest, data.images)):
            records = read_records(manifest)
            check_latents(records, fps=float(data.fps), vae=vae.digest)
    defaults = models.sample_config(cfg.sample.to_dict())
    defaults = made_for(defaults, data, model.latent)
    tokenize = load_tokenizer(model.tokenizer, model.text and model.text.vocabulary)
    return Experiment(model, data, defaults, tokenize, vae)


def run_experiment(
    cfg: Any, workdir: str | Path, described: Experiment, task: Task, **functions: Any
) -> Path:
    """Trains by the given functions of `run_training`; returns the model's folder.

    Weights that are neither the DiT's nor the text encoder's don't go with the model.
    """
    workdir, (model, _, defaults, _, vae) = Path(workdir), described
    state = train_dit(cfg, workdir, described, task, **functions)
    averages = {"model": state.ema, "best": best_average(workdir, state)}
    for name, average in averages.items():
        if average is None:
            continue
        own = {part: average[part] for part in ("dit", "text") if part in average}
        weights = sharding.to_host(own)
        if jax.process_index() == 0:
            folder.save_model(workdir / name, model, defaults, weights, vae)
    return workdir / "model"


def train_dit(
    cfg: Any,
    workdir: Path,
    described: Experiment,
    task: Task,
    *,
    sampled: Callable[[Any], Any] = lambda averages: averages,
    **functions: Any,
) -> TrainState:
    """Trains by a task and other functions of `run_training`; returns the last state.

    Args:
        sampled: the weights of the samples, from the averages of a state.
    """
    model, data, defaults, tokenize, vae = described
    pipeline = VideoPipeline(model, None, tokenize, defaults, vae=vae)
    words = None if model.text is None else tokenize
    load = latent_encoder(described, cfg.seed)
    sample = sampler(workdir, pipeline, data, cfg.prompts)

    def own_batches(mesh: Mesh) -> grain.DatasetIterator[Rows]:
        rows = sharding.own_rows(data.batch, mesh)
        return batches(data, words, workdir, rows, load=load)

    return run_training(
        cfg,
        workdir,
        task,
        batches=own_batches,
        sample=lambda step, averages: sample(step, sampled(averages)),
        validate=validator(workdir, data, words, task.loss, load),
        **functions,
    )


def arithmetic(model: ModelConfig, passes: int = 3) -> Arithmetic:
    """How the work of a training step on packed rows is counted.

    Args:
        passes: forward ones, to which the products with weights come: a backward pass
            is two, or one where the weights are frozen. That of attention is two.
    """
    init = partial(models.initialise, model)
    weights = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    cost = flops.row_cost(model, weights)

    def count(rows: Rows) -> RowWork:
        parts = rows.text_segment, rows.segment, rows.stage
        attention = 3 * cost.pair * flops.row_pairs(rows, model.dit.causal)
        places = passes * cost.products(*(part.shape[1] for part in parts))
        products = passes * cost.products(*flops.row_counts(rows))
        return RowWork(products + attention, places + attention)

    stated = model.dit.dtype == "bfloat16"  # the peaks of chips are of this type
    kind = jax.devices()[0].device_kind
    return Arithmetic(count, flops.peak(kind) if stated else None)


def latent_encoder(described: Experiment, seed: int) -> LoadLatent | None:
    """How files become latents on the devices; None: they are loaded as usual."""
    data, vae = described.data, described.vae
    if vae is None or not data.encode:
        return None
    return partial(encoded_latent, data, autoencoder.free_encoder(vae, seed))


def validator(
    workdir: Path,
    data: DataConfig,
    tokenize: Tokenize | None,
    loss: Loss,
    load: LoadLatent | None = None,
) -> Sample | None:
    """A function (step, weights) that measures the loss on the held-out records.

    Rows and noise are the same each time, and captions are never dropped. Returns
    `validation_loss` and the loss of every stage; None if nothing is held out.
    """
    if not data.held_out:
        return None
    data = dataclasses.replace(data, dropout=0.0)
    examples = data.held_out * len(data.pattern)
    count = -(-examples // (data.batch * data.segments))
    kept: list[Rows] = []
    measure = jax.jit(loss)

    def validate(step: int, params: Any) -> dict[str, float]:
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        if not kept:
            rows = sharding.own_rows(data.batch, mesh)
            held = batches(data, tokenize, workdir, rows, load=load, split="held out")
            with closing(held):
                kept.extend(islice(held, count))
        sums, counts = (
            np.zeros(len(data.stage_shares)),
            np.zeros(len(data.stage_shares)),
        )
        for number, rows in enumerate(kept):
            key = jax.random.key(number)
            _, losses = measure(params, sharding.global_batch(rows, mesh), key)
            sums = sums + np.asarray(losses.stage_sum)
            counts = counts + np.asarray(losses.stage_count)
        values = {"validation_loss": float(sums.sum() / counts.sum())}
        for stage in np.flatnonzero(counts):
            values[f"validation_loss_stage_{stage}"] = float(
                sums[stage] / counts[stage]
            )
        return values

    return validate


def with_latents(model: ModelConfig, latent: LatentConfig) -> ModelConfig:
    """The model with a VAE's latents, whose statistics are measured, not configured.

    Raises:
        ValueError: the VAE has latents of another size than the model's.
    """
    sizes = ("channels", "spatial", "temporal")
    ours, theirs = ([getattr(x, n) for n in sizes] for x in (model.latent, latent))
    if ours != theirs:
        raise ValueError(
            f"model.latent has {', '.join(sizes)} {ours}, the VAE has {theirs}; "
            "change model.latent, or give the VAE that belongs to it"
        )
    return dataclasses.replace(model, latent=latent)


def made_for(
    defaults: SampleConfig, data: DataConfig, latent: LatentConfig
) -> SampleConfig:
    """Defaults for sampling with a training run's sizes, length and frame rate."""
    longest = latent.longest(data.frames)
    sizes = tuple((*size, longest) for size in data.all_sizes)
    return dataclasses.replace(defaults, sizes=sizes, fps=float(data.fps))


def start_weights(model: ModelConfig, start: str | Path, tuned: bool = False) -> Any:
    """The weights of the model in the folder `start`.

    Args:
        tuned: it may have read its history in another way (`clean_history`, `causal`).

    Raises:
        ValueError: there is no such model, or it is of another config.
    """
    pipeline = video.load(start)
    cfg = pipeline.cfg
    if tuned:
        ours = {"clean_history": model.dit.clean_history, "causal": model.dit.causal}
        cfg = dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, **ours))
    check_start(model, cfg, start)
    return pipeline.params


def check_start(model: ModelConfig, other: ModelConfig, start: str | Path) -> None:
    """Checks that the weights of another model mean the same in this one.

    Raises:
        ValueError: they don't.
    """
    how = {"dtype": "", "products": "exact", "remat": "nothing"}
    how |= {"attention": None, "attention_tiles": None}
    dits = (dataclasses.replace(cfg.dit, **how) for cfg in (model, other))
    if len({*dits}) > 1 or model.text != other.text:
        raise ValueError(
            f"the model in {start} is of another config than this run's; train with "
            "the `model` section that it was made with"
        )


def data_config(cfg: Any, model: ModelConfig) -> DataConfig:
    """The `data` section, with the latents and the layout of the model.

    Raises:
        ValueError: an entry is wrong, or not one of every stage of the model.
    """
    shared = {"latent": model.latent, "layout": model.layout}
    data = build(DataConfig, cfg.data.to_dict() | shared)
    if len(data.stage_shares) != len(model.stages):
        raise ValueError(
            f"stage_shares {data.stage_shares} must have one entry for each of the "
            f"{len(model.stages)} stages of model.edges"
        )
    return data


def sampler(
    workdir: Path, pipeline: VideoPipeline, data: DataConfig, prompts: Sequence[str]
) -> Callable[[int, Any], None]:
    """A function (step, weights) that writes samples/STEP/*.mp4 and a contact sheet.

    Without prompts, a text encoder or, in a latent space, a VAE it does nothing.
    """
    undecoded = pipeline.vae is None and pipeline.cfg.latent.spatial > 1
    if not prompts or pipeline.cfg.text is None or undecoded:
        logger.info("no samples: this run lacks prompts, a text encoder, or a VAE")
        return lambda step, params: None
    size: Any = {"height": data.height, "width": data.width, "num_frames": data.frames}

    def sample(step: int, params: Any) -> None:
        now = dataclasses.replace(pipeline, params=params)
        videos = now(prompts, seed=0, **size).frames  # on all processes
        if jax.process_index() > 0:
            return
        folder = workdir / "samples" / f"{step:07}"
        scale = max(1, 256 // data.width)
        for i, frames in enumerate(videos):
            write_video(folder / f"{i}.mp4", frames, data.fps, scale=scale)
        write_contact_sheet(folder / "contact_sheet.png", list(videos), prompts)

    return sample
