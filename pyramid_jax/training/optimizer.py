# SPDX-License-Identifier: Apache-2.0
"""AdamW or Muon with clipping, warm-up and a schedule, from a config."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey
from optax.contrib import MuonDimensionNumbers

from pyramid_jax import sharding
from pyramid_jax.config import check_entries

KINDS, SCHEDULES = ("adamw", "muon"), ("constant", "cosine")
DECAYED = {"kernel", "table", "embedding"}  # never biases, nor the weights of norms


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, and its learning rate over the updates.

    Args:
        kind: "adamw"; or "muon", which makes the updates of matrices orthogonal and
            leaves everything else to AdamW. Its rates are about those of AdamW.
        clip: largest global norm of the gradient; None does not clip.
        schedule: what follows the warm-up: "constant", or "cosine" to `final_rate`.
        warmup_steps: updates of the linear warm-up, from `warmup_from` (its first
            update) to `learning_rate` (its last).
        steps: updates at whose end the cosine arrives.

    Raises:
        ValueError: a value is out of range.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    schedule: str = "constant"
    warmup_steps: int = 1000
    warmup_from: float = 1e-6
    steps: int = 100_000
    final_rate: float = 1e-5

    def __post_init__(self):
        check_entries(self, KINDS.__contains__, f"one of {KINDS}", "kind")
        check_entries(self, SCHEDULES.__contains__, f"one of {SCHEDULES}", "schedule")
        rate = "positive, e.g. 1e-4"
        check_entries(self, lambda x: x > 0, rate, "learning_rate")
        norm = "positive; None does not clip the gradient"
        check_entries(self, lambda x: x is None or x > 0, norm, "clip")
        steps = f"in 0..{self.steps} (steps); shorten the warm-up or train longer"
        check_entries(self, lambda n: 0 <= n <= self.steps, steps, "warmup_steps")


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates so far.

    optax has the same curves, but rounds them differently: runs would change.

    Source: the reference's `cosine_scheduler` and `constant_scheduler`.
    """
    peak, warm, low = cfg.learning_rate, cfg.warmup_steps, cfg.warmup_from

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        rising = low + (peak - low) * n / max(warm - 1, 1)
        after = jnp.full_like(n, peak)
        if cfg.schedule == "cosine":
            done = jnp.clip((n - warm) / max(cfg.steps - warm, 1), 0.0, 1.0)
            swing = (1 + jnp.cos(jnp.pi * done)) / 2
            after = cfg.final_rate + (peak - cfg.final_rate) * swing
        return jnp.where(n < warm, rising, after)

    return rate


def optimizer(
    cfg: OptimizerConfig, weights: Any = None
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the updates; only matrices and tables decay.

    Args:
        weights: those that it will change, or their shapes; Muon has to know them.

    Raises:
        ValueError: Muon, and weights are not given.

    Source: for Muon, https://kellerjordan.github.io/posts/muon, with the scale of
    arXiv:2502.16982.
    """
    if cfg.kind == "muon" and weights is None:
        raise ValueError(
            'optimizer.kind "muon" trains the DiT only; use "adamw" for other networks'
        )
    if cfg.kind == "adamw":
        rule = optax.adamw(
            learning_rate(cfg),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=decays,
        )
    else:
        rule = optax.contrib.muon(
            learning_rate(cfg),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            weight_decay_mask=decays,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            muon_weight_dimension_numbers=matrices(weights),
            consistent_rms=0.2,  # of an update of AdamW
        )
    clip = [] if cfg.clip is None else [optax.clip_by_global_norm(cfg.clip)]
    return optax.chain(*clip, rule)


def decays(params: Any) -> Any:
    """Whether weight decay applies to each weight: by name, as stacks add an axis.

    Source: the reference decays what has two axes or more and is no bias.
    """

    def decay(path: tuple[Any, ...], _: Any) -> bool:
        names = _names(path)
        return bool(names) and names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decay, params)


def matrices(weights: Any) -> Any:
    """Which axes of each kernel are inputs and outputs of its matrix, else None.

    The outputs are those of its bias; an axis that both have in front is a stack's.
    """
    weights = sharding.unbox(weights)
    shapes = {
        _names(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }

    def axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        *where, name = _names(path)
        bias = shapes.get((*where, "bias"))
        if name != "kernel" or bias is None:
            return None
        stacked = int(len(bias) > 1 and bias[0] == leaf.shape[0])
        first = leaf.ndim - len(bias) + stacked
        return MuonDimensionNumbers(
            tuple(range(stacked, first)), tuple(range(first, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, weights)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on the way to a weight, whether it is in a box or not."""
    return tuple(key.key for key in path if isinstance(key, DictKey))
