# SPDX-License-Identifier: Apache-2.0
"""What a run trains: one description for the run and for a plan of its step."""

from typing import Any, NamedTuple

import optax

from pyramid_jax.training.state import Init, TrainState, with_moments
from pyramid_jax.training.step import Loss, Step, StepConfig, train_step


class Task(NamedTuple):
    """Fresh weights, their loss, and the rule that changes them.

    `rate` is the learning rate, for the metrics.
    """

    init: Init
    loss: Loss
    optimizer: optax.GradientTransformation
    rate: optax.Schedule


def task_step(
    task: Task, how: StepConfig, like: TrainState, frozen: Any = None
) -> tuple[Step, TrainState]:
    """The step of a run, and the state that it takes, as shapes.

    Args:
        like: shapes of the state in a checkpoint, as `abstract_state` has them.
        frozen: weights that stay as they are, or their shapes.
    """
    state = with_moments(like, how.moments)._replace(frozen=frozen)
    return train_step(task.loss, task.optimizer, task.rate, how, state), state
