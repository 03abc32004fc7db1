# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a training step, so that arms are trained for the same."""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from pyramid_jax import flops, sharding
from pyramid_jax import model as models
from pyramid_jax.data.loader import batches
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.model import ModelConfig
from pyramid_jax.shapes import Rows
from pyramid_jax.train import data_config

COUNTED = 24  # batches, of which an arm's mean is taken


class Cost(NamedTuple):
    """A mean training step: FLOP forward and backward, and what is in the rows."""

    flop: float
    video_tokens: float
    text_tokens: float
    segments: float


def rows_cost(model: ModelConfig, weights: Any, rows: Rows) -> Cost:
    """What a step on a batch is; padding and pairs that the mask hides are not counted.

    A backward pass is two forward ones, as usual.

    Args:
        weights: shapes of the model's.
    """
    cost = flops.row_cost(model, weights)
    text, video, segments = map(int, flops.row_counts(rows).sum(axis=1))
    pairs = int(flops.row_pairs(rows, model.dit.causal).sum())
    forward = cost.products(text, video, segments) + cost.pair * pairs
    return Cost(3.0 * forward, video, text, segments)


def mean_cost(cfg: Any, folder: Any) -> Cost:
    """What a step of a config's run is, as a mean over its first batches."""
    model = models.model_config(cfg.model.to_dict())
    init = partial(models.initialise, model)
    weights = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    tokenize = load_tokenizer(model.tokenizer, model.text and model.text.vocabulary)
    stream = batches(data_config(cfg, model), tokenize, folder)
    found = [rows_cost(model, weights, rows) for rows in islice(stream, COUNTED)]
    stream.close()
    return mean(found)


def mean(costs: Iterable[Cost]) -> Cost:
    """The mean of steps."""
    return Cost(*np.mean(list(costs), axis=0).tolist())


def steps_of(flop: float, cost: Cost, points: int = 1) -> int:
    """Steps that take about so much arithmetic, a multiple of `points`."""
    return points * max(1, round(flop / cost.flop / points))
