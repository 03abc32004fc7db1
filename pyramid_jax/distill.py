# SPDX-License-Identifier: Apache-2.0
"""Distillation from a config: a run of the DiT whose targets a teacher makes.

Rows, loop, checkpoints and the model's folder are those of `pyramid_jax/train.py`. The
teacher's weights and the text encoder are part of the state, and frozen: a continued
run needs the teacher's folder no more.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import repeat
from jaxtyping import Float, Int

from pyramid_jax import model as models
from pyramid_jax import objective
from pyramid_jax.config import build
from pyramid_jax.data.stored import read_records, stored_features
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import ModelConfig
from pyramid_jax.objective import Losses
from pyramid_jax.reflow import ReflowConfig, reflow_loss
from pyramid_jax.shapes import Array, Rows, Text
from pyramid_jax.train import Experiment, experiment, run_experiment, start_weights
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.task import Task


class Caption(NamedTuple):
    """A caption as rows hold it: token ids, or stored features and a pooled vector."""

    text: Int[np.ndarray, "_"] | Float[np.ndarray, "_ _"]
    pooled: Float[np.ndarray, "1 _"]


class Distillation(NamedTuple):
    """What a student is, and what it learns from: a walk guided away from a caption."""

    model: ModelConfig
    reflow: ReflowConfig
    negative: Caption


def distill(cfg: Any, workdir: str | Path, teacher: str | Path | None = None) -> Path:
    """Trains a student as a config says, or continues its run; returns its folder.

    Args:
        teacher: folder of the model whose weights a new student starts from, and whose
            steps and guidance the section `teacher` tells.

    Raises:
        ValueError: as `train`; or a new run has no teacher.
    """
    described = experiment(cfg)
    model = described.model
    reflow = reflow_config(cfg)
    return run_experiment(
        cfg,
        workdir,
        described,
        student_task(cfg, Distillation(model, reflow, negative_caption(described))),
        pretrained=partial(teacher_weights, model, teacher),
    )


def reflow_config(cfg: Any) -> ReflowConfig:
    """The `teacher` section."""
    section = cfg.teacher.to_dict()
    guidance = build(Guidance, section.pop("guidance"))
    return build(ReflowConfig, section | {"guidance": guidance})


def student_task(cfg: Any, what: Distillation) -> Task:
    """What `distill` trains: a DiT, beside a teacher that stays as it is."""
    rates, model = build(OptimizerConfig, cfg.optimizer.to_dict()), what.model
    init = partial(_initialise, model)
    weights = jax.eval_shape(init, jax.random.key(0))
    labels = {name: "student" if name == "dit" else "frozen" for name in weights}
    trained = {name: weights[name] if name == "dit" else None for name in weights}
    rules: dict[Any, optax.GradientTransformation]
    rules = {"student": optimizer(rates, trained), "frozen": optax.set_to_zero()}
    rule = optax.multi_transform(rules, labels)
    return Task(init, partial(distillation_loss, what), rule, learning_rate(rates))


def teacher_weights(model: ModelConfig, teacher: str | Path | None) -> dict[str, Any]:
    """What a student starts from: the teacher's weights, twice.

    Raises:
        ValueError: there is no such model, or it is of another config.
    """
    if teacher is None:
        raise ValueError(
            "--start is missing; give the folder of the teacher, from whose weights a "
            "student starts"
        )
    weights = start_weights(model, teacher)
    return weights | {"teacher": jax.tree.map(np.asarray, weights["dit"])}


def negative_caption(described: Experiment) -> Caption:
    """The empty caption, as training sees it."""
    if described.model.text is None:
        records = read_records(described.data.manifest)
        return Caption(*stored_features(records[0], dropped=True))
    ids = np.array(described.tokenize(""), np.int32)
    return Caption(ids, np.zeros((1, 0), np.float32))


def distillation_loss(
    task: Distillation, params: Any, rows: Rows, key: jax.Array, step: Any = None
) -> tuple[Float[jax.Array, ""], Losses]:
    """The loss of a batch, and its sums per stage; see `reflow.reflow_loss`."""
    model = task.model
    networks: list[Any] = [
        models.velocity_network(model, weights)
        for weights in (params, {"dit": params["teacher"]})
    ]
    student, teacher = (partial(one, current=rows.current) for one in networks)
    text = models.row_text(model, params, rows)
    losses = reflow_loss(
        partial(student, text=text),
        partial(teacher, text=text),
        partial(teacher, text=negative_text(model, params, rows.stage, task.negative)),
        rows,
        objective.draw(key, rows),
        stages=model.stages,
        noise=model.history_noise,
        cfg=task.reflow,
    )
    return losses.loss, losses


def negative_text(
    model: ModelConfig, params: Any, stage: Int[Array, "b s"], negative: Caption
) -> Text:
    """The negative caption of every segment of packed rows, by the segments' stages."""
    b, s = stage.shape
    places = jnp.where(stage >= 0, jnp.arange(s, dtype=jnp.int32), -1)
    places = repeat(places, "b s -> b (s m)", m=len(negative.text))
    words = jnp.asarray(repeat(negative.text, "m ... -> b (s m) ...", b=b, s=s))
    if model.text is None:
        pooled = repeat(negative.pooled, "1 d -> b s d", b=b, s=s)
        return Text(words, places, jnp.asarray(pooled))
    return models.encode_text(model, params, words, places, s)


def _initialise(model: ModelConfig, key: jax.Array) -> Any:
    params = models.initialise(model, key)
    return params | {"teacher": params["dit"]}
