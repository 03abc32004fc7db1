# SPDX-License-Identifier: Apache-2.0
"""Stage reflow: a student takes in one step what a teacher takes in many, guided.

A stage is a window: the teacher walks from its start to where guidance leads, and the
student learns the straight path between the two, for one prompt alone. Everything else
is the training objective: rows, noise of the history, places on the path.

Source: PeRFlow (arXiv:2405.07510), with the pyramid's stages as windows; guidance is
distilled with it as in arXiv:2210.03142.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pyramid_jax import objective, pyramid
from pyramid_jax.config import check_entries
from pyramid_jax.guidance import Guidance
from pyramid_jax.objective import Draws, HistoryNoise, Losses, StagePath
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import Rows, Tokens

# A network with captions, as a function of tokens and time.
Flow = Callable[[Tokens, jax.Array], jax.Array]


@dataclass(frozen=True)
class ReflowConfig:
    """How the teacher walks, and where on its paths the student learns.

    Args:
        steps: evaluations of the teacher in every stage.
        guidance: of the teacher; the student needs none afterwards.
        at_start: share of the segments that are at the start of their path, where a
            student with one step per stage is asked; the others are anywhere on it.

    Raises:
        ValueError: a value is out of range, or guidance that changes from unit to unit.
    """

    steps: int = 4
    guidance: Guidance = field(default_factory=Guidance)
    at_start: float = 0.5

    def __post_init__(self):
        check_entries(self, lambda n: n >= 1, "1 or more", "steps")
        check_entries(self, lambda x: 0 <= x <= 1, "0 to 1", "at_start")
        if self.guidance.decay is not None:
            raise ValueError(
                f"guidance decays by {self.guidance.decay} per unit, which a student "
                "can't learn from packed rows; leave out `decay`"
            )


def reflow_loss(
    student: Flow,
    teacher: Flow,
    away: Flow,
    rows: Rows,
    draws: Draws,
    *,
    stages: Sequence[Stage],
    noise: HistoryNoise,
    cfg: ReflowConfig,
) -> Losses:
    """How far the student is from the teacher's paths on a batch of packed rows.

    Args:
        student, teacher: with the captions of the rows.
        away: the teacher with what it is guided away from.
    """
    path = objective.stage_path(rows, draws, stages, noise)
    end = walk(teacher, away, path, rows, cfg)
    path = path._replace(end=jax.lax.stop_gradient(end))
    # The draw decides both: below the share, the start; above it, a place on the path.
    place = (draws.level - cfg.at_start) / max(1 - cfg.at_start, 1e-6)
    sigma = jnp.where(place < 0, 1.0, 1 - place)
    example = path.at(sigma, rows)
    predicted = student(example.tokens, example.time)
    return objective.squared_error(predicted, example.target, rows, len(stages))


def walk(
    teacher: Flow, away: Flow, path: StagePath, rows: Rows, cfg: ReflowConfig
) -> Float[jax.Array, "b n p"]:
    """Where Euler steps with guidance lead from the start of every segment's stage."""
    first, later = cfg.guidance.scales(2).astype(np.float32)
    scale = jnp.where(rows.frame == 0, first, later)[..., None]
    sigmas = pyramid.sigmas(cfg.steps + 1, last_step=False).astype(np.float32)

    def step(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        time, tokens = path.time(pair[0]), path.tokens(x, rows)
        negative, positive = away(tokens, time), teacher(tokens, time)
        v = negative + scale * (positive - negative)
        return pyramid.euler(x, v, pair[0], pair[1]), None

    pairs = jnp.asarray(np.stack([sigmas[:-1], sigmas[1:]], axis=1))
    return jax.lax.scan(step, path.start, pairs)[0]
