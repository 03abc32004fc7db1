# SPDX-License-Identifier: Apache-2.0
"""Training from a config: data, model, optimizer and loop put together."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax

from pyramid_jax import config, generate, sharding
from pyramid_jax.config import ModelConfig, SampleConfig, build
from pyramid_jax.contact_sheet import write_contact_sheet
from pyramid_jax.data.pipeline import DataConfig, batches
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.data.video_io import write_video
from pyramid_jax.run import Task, run, with_weights
from pyramid_jax.shapes import Rows
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import TrainState


def train(cfg: Any, workdir: str | Path, start: str | Path | None = None) -> Path:
    """Trains as a config says, or continues what `workdir` holds; returns the model.

    The folder gets checkpoints/, samples/, the loss (metrics.jsonl, TensorBoard files,
    loss.png), skipped.jsonl if data files were unusable, and the model of the moving
    average in model/, which `generate.load` reads.

    Args:
        start: folder of a model whose weights a new run starts from (fine-tuning).

    Raises:
        ValueError: a section of the config is wrong, or `workdir` or `start` is of
            another config.
    """
    workdir = Path(workdir)
    model = config.model_config(cfg.model.to_dict())
    defaults = config.sample_config(cfg.sample.to_dict())
    data = data_config(cfg, model)
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())

    task = Task(
        init=partial(config.initialise, model),
        loss=partial(config.loss, model),
        optimizer=optimizer(rates),
        rate=learning_rate(rates),
        batches=training_rows(data, model, workdir),
        sample=sampler(workdir, model, defaults, data, cfg.prompts),
    )
    if start is not None:
        task = task._replace(prepare=partial(start_from, model, start))
    weights = sharding.to_host(run(cfg, workdir, task).ema)
    if jax.process_index() == 0:
        generate.save(workdir / "model", model, defaults, weights)
    return workdir / "model"


def start_from(model: ModelConfig, folder: str | Path, new: TrainState) -> TrainState:
    """A new state with the weights of the model in a folder.

    Raises:
        ValueError: there is no such model, or it is of another config.
    """
    there = generate.load(folder)
    if there.cfg.dit != model.dit or there.cfg.text != model.text:
        raise ValueError(
            f"the model in {folder} is of another config than this run's; train with "
            "the `model` section that it was made with"
        )
    return with_weights(new, there.params)


def data_config(cfg: Any, model: ModelConfig) -> DataConfig:
    """The `data` section, with the stride of the model's latents."""
    stride = (model.latent.temporal, model.latent.spatial)
    return build(DataConfig, cfg.data.to_dict() | {"stride": stride})


def training_rows(
    data: DataConfig, model: ModelConfig, workdir: Path
) -> grain.DatasetIterator[Rows]:
    """This process's share of the packed rows."""
    return batches(
        data,
        model.layout,
        None if model.text is None else load_tokenizer(model.tokenizer),
        workdir,
        shard=(jax.process_index(), jax.process_count()),
        load=config.pixel_latents(model, data),
    )


def sampler(
    workdir: Path,
    model: ModelConfig,
    defaults: SampleConfig,
    data: DataConfig,
    prompts: Sequence[str],
) -> Callable[[int, Any], None]:
    """A function (step, weights) that writes samples/STEP/*.mp4 and a contact sheet."""
    size = generate.Size(data.height, data.width, data.frames)
    tokenize = load_tokenizer(model.tokenizer)

    def sample(step: int, params: Any) -> None:
        made = generate.VideoModel(model, params, tokenize, defaults)
        videos = made.text_to_video(prompts, size)  # on all processes
        if jax.process_index() > 0:
            return
        folder = workdir / "samples" / f"{step:07}"
        scale = max(1, 256 // data.width)
        for i, video in enumerate(videos):
            write_video(folder / f"{i}.mp4", video, data.fps, scale=scale)
        write_contact_sheet(folder / "contact_sheet.png", list(videos), prompts)

    return sample
