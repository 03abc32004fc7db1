# SPDX-License-Identifier: Apache-2.0
"""Whole training steps: the columns of a recorded batch as segments of packed rows."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from launch.parity import batch as batches
from launch.parity.batch import Batch, Column
from launch.parity.cases import (
    DIT,
    LOSS,
    QUICK,
    SCHEDULE,
    TARGETS,
    Answer,
    Case,
    Scenario,
)
from launch.parity.dit import gradient_answers
from launch.parity.model import Model, load, text
from launch.parity.model import velocity as network
from pyramid_jax import objective, pyramid
from pyramid_jax.objective import Draws
from pyramid_jax.shapes import Rows, Tokens


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "draw.noise" in scenario.tensors and "in.prompt_embeds" in scenario.tensors


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded training step."""
    model = load(case, scenario.settings)
    batch = batches.read(scenario, model.layout)
    yield from _step(scenario, model, batch)


def _step(scenario: Scenario, model: Model, batch: Batch) -> Iterator[Answer]:
    """Prediction, target, loss and gradients of the columns as packed rows."""
    columns = batch.columns
    rows, draws = _packed(columns)
    words, valid = _text(scenario, len(columns))
    rows = rows._replace(
        text=words.features, text_segment=words.segment, pooled=words.pooled
    )
    if "mid.encoder_attention_mask" in scenario.tensors:
        yield Answer("mid.encoder_attention_mask", valid, 0.0)
    outputs = {}

    def loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        def velocity(tokens: Tokens, time: Any, text: Any, *_: Any, **__: Any) -> Any:
            outputs["time"] = time
            outputs["pred"] = network(model.cfg, params, tokens, time, text)
            return outputs["pred"]

        losses = objective.loss(velocity, rows, words, draws, batch.stages, batch.noise)
        return losses.loss, (outputs["pred"], outputs["time"])

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (value, (pred, time)), gradients = run(model.params)
    target = batches.noisy(rows, draws, batch.stages, batch.noise).target
    ends = np.cumsum([c.rows.clean.shape[1] for c in columns])[:-1]
    for kind, tokens, limit in (("pred", pred, DIT), ("target", target, TARGETS)):
        parts = np.split(np.asarray(tokens), ends, axis=1)
        for k, (part, column) in enumerate(zip(parts, columns, strict=True)):
            latent = batches.latents(part, column, batch.layout)[-1]
            yield Answer(f"mid.{kind}.{k}", latent, limit)
    scale = SCHEDULE * pyramid.TIME_SCALE
    yield Answer("mid.model_timesteps", rearrange(time, "b s -> (b s)"), scale)
    yield Answer("out.loss", value, LOSS, relative=True)
    yield from gradient_answers(model, scenario, gradients)


def _packed(columns: list[Column]) -> tuple[Rows, Draws]:
    """The columns as segments of the same rows."""

    def join(parts: Any) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in parts], axis=1)

    rows = Rows(
        *(join(field) for field in zip(*(c.rows for c in columns), strict=True))
    )
    segment = join(c.rows.segment + k for k, c in enumerate(columns))
    draws = zip(*(c.draws for c in columns), strict=True)
    draws = Draws(*(jnp.asarray(join(field)) for field in draws))
    return rows._replace(segment=segment), draws


def _text(scenario: Scenario, segments: int) -> tuple[Any, np.ndarray]:
    """The text of the packed rows with recorded caption dropping, and its mask."""
    tensors = scenario.tensors
    dropped = tensors["draw.drop_u"] <= scenario.settings["cfg_rate"]
    parts = []
    for name, null in (
        ("prompt_embeds", "prompt_embed"),
        ("prompt_attention_mask", "prompt_attention_mask"),
        ("pooled_prompt_embeds", "pooled_prompt_embed"),
    ):
        features, empty = tensors[f"in.{name}"], tensors[f"in.null.{null}"][None]
        drop = dropped.reshape((-1,) + (1,) * (features.ndim - 1))
        parts.append(np.where(drop, empty, features))
    return text(*parts, segments=segments), parts[1]
