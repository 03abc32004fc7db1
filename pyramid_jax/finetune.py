# SPDX-License-Identifier: Apache-2.0
"""Adapters from a config: a run of the DiT in which a model's weights stay frozen.

Rows, loop and metrics are those of `pyramid_jax/train.py`. Only the adapters have
gradients, moments, an average and checkpoints; a continued run reads the model again.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Float

from pyramid_jax import model as models
from pyramid_jax import sharding
from pyramid_jax.checkpoint import files
from pyramid_jax.config import asset_path, build
from pyramid_jax.lora import LoRAConfig, adapted, fresh_adapters
from pyramid_jax.model import ModelConfig
from pyramid_jax.models.dit import BLOCKS
from pyramid_jax.objective import Losses
from pyramid_jax.pipeline.adapters import save_adapters
from pyramid_jax.shapes import Rows
from pyramid_jax.train import arithmetic, check_start, experiment, train_dit
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.task import Task

logger = logging.getLogger(__name__)

ADAPTERS = "lora"  # the entry of the weights that is trained


def finetune(cfg: Any, workdir: str | Path, base: str | Path | None = None) -> Path:
    """Trains adapters as a config says, or continues a run; returns their file.

    Args:
        base: folder of the model whose weights the adapters change.

    Raises:
        ValueError: as `train`; or there is no base.
    """
    if base is None:
        raise ValueError(
            "--start is missing; give the folder of the model that is fine-tuned"
        )
    described = experiment(cfg)
    model, lora = described.model, build(LoRAConfig, cfg.lora.to_dict())
    state = train_dit(
        cfg,
        Path(workdir),
        described,
        adapter_task(cfg, model, lora),
        frozen=partial(base_weights, model, lora.base, base),
        sampled=partial(with_adapters, lora),
        arithmetic=arithmetic(model, passes=2),
    )
    trained = sharding.to_host(state.ema[ADAPTERS])
    if jax.process_index() == 0:
        save_adapters(Path(workdir), model.dit, trained, lora.scale)
    return Path(workdir) / "lora.safetensors"


def adapter_task(cfg: Any, model: ModelConfig, lora: LoRAConfig) -> Task:
    """What `finetune` trains: adapters of a model whose weights stay as they are."""
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    return Task(
        partial(initialise_adapters, model, lora),
        partial(adapter_loss, model, lora),
        optimizer(rates),
        learning_rate(rates),
    )


def initialise_adapters(model: ModelConfig, lora: LoRAConfig, key: jax.Array) -> Any:
    """Fresh adapters of a model's blocks, in boxes."""
    weights = jax.eval_shape(partial(models.initialise, model), key)["dit"]
    blocks = {name: weights[name] for name in BLOCKS if name in weights}
    return {ADAPTERS: fresh_adapters(lora, blocks, key)}


def base_weights(
    model: ModelConfig, dtype: str, base: str | Path, mesh: Mesh
) -> dict[str, Any]:
    """The weights of the model in a folder, each read straight to its devices.

    Text encoders and a VAE beside them are not read.

    Raises:
        ValueError: there is no such model, or it is of another config.
    """
    folder = asset_path(base)
    section = files.read_config(folder, "a model", "model")["model"]
    check_start(model, models.model_config(section), folder)
    shapes = jax.eval_shape(partial(models.initialise, model), jax.random.key(0))
    return files.read_weights(folder, shapes, files.placing(shapes, mesh, dtype))


def base_shapes(model: ModelConfig, dtype: str, mesh: Mesh) -> Any:
    """Shapes and places of `base_weights`."""
    shapes = jax.eval_shape(partial(models.initialise, model), jax.random.key(0))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
        sharding.unbox(shapes),
        sharding.shardings(shapes, mesh),
    )


def with_adapters(lora: LoRAConfig, weights: Any) -> Any:
    """A model's weights, with what is trained beside its kernels."""
    dit = adapted(weights["dit"], weights[ADAPTERS], lora.scale)
    others = {name: x for name, x in weights.items() if name != ADAPTERS}
    return others | {"dit": dit}


def adapter_loss(
    model: ModelConfig,
    lora: LoRAConfig,
    weights: Any,
    rows: Rows,
    key: jax.Array,
    step: Any = None,
) -> tuple[Float[jax.Array, ""], Losses]:
    """The training loss of a batch with adapters; see `model.training_loss`."""
    return models.training_loss(model, with_adapters(lora, weights), rows, key, step)
