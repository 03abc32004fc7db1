# SPDX-License-Identifier: Apache-2.0
"""AdamW with clipping, warm-up and a schedule, from a config."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from pyramid_jax.config import check_entries

SCHEDULES = ("constant", "cosine")
DECAYED = {"kernel", "table", "embedding"}  # never biases, nor the weights of norms


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and its learning rate over the updates.

    Args:
        clip: largest global norm of the gradient; None does not clip.
        schedule: what follows the warm-up: "constant", or "cosine" to `final_rate`.
        warmup_steps: updates of the linear warm-up, from `warmup_from` (its first
            update) to `learning_rate` (its last).
        steps: updates at whose end the cosine arrives.

    Raises:
        ValueError: a value is out of range.
    """

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


def optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; only matrices and tables decay."""
    adamw = optax.adamw(
        learning_rate(cfg),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decays,
    )
    clip = [] if cfg.clip is None else [optax.clip_by_global_norm(cfg.clip)]
    return optax.chain(*clip, adamw)


def decays(params: Any) -> Any:
    """Whether weight decay applies to each weight: by name, as stacks add an axis.

    Source: the reference decays what has two axes or more and is no bias.
    """

    def decay(path: tuple[Any, ...], _: Any) -> bool:
        names = [key.key for key in path if isinstance(key, DictKey)]
        return bool(names) and names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decay, params)
