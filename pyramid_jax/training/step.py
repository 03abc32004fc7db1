# SPDX-License-Identifier: Apache-2.0
"""One training step: gradients over microbatches, an update, the moving average."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Float, Int, Key

from pyramid_jax import programs, sharding
from pyramid_jax.config import check_entries
from pyramid_jax.shapes import Array
from pyramid_jax.training.state import TrainState

# (params, batch, key) -> (mean loss, sums for the metrics); their `weight` is what the
# mean is over, e.g. a number of segments. `train_step` also gives it `step=`: updates
# so far, since a loss may change over a run.
Loss = Callable[..., tuple[jax.Array, Any]]
Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, "Report"]]


@dataclass(frozen=True)
class StepConfig:
    """How gradients become a step.

    Args:
        accumulate: microbatches per step; a batch is cut into so many.
        ema_decay: of the moving average, each time it is updated.
        ema_every: updates of the weights per update of their average; it reads and
            writes as many bytes as a third of AdamW.
        ema_warmup: update n uses at most (1 + n) / (10 + n), so that the average soon
            forgets the initial weights.
        float32_sums: gradients of weight matrices are added up over devices in float32
            instead of the type of the products, which takes twice the bytes.
        skip_above: a step whose loss is larger changes nothing; None skips only steps
            whose loss or gradient is not finite.
        moments: where the optimizer's moments are while gradients are computed, on the
            "device" or on the "host", which costs two moves of them per step.

    Raises:
        ValueError: a value is out of range.
    """

    accumulate: int = 1
    ema_decay: float = 0.9999
    ema_every: int = 1
    ema_warmup: bool = True
    float32_sums: bool = False
    skip_above: float | None = None
    moments: str = "device"

    def __post_init__(self):
        least = "1 or more"
        check_entries(self, lambda n: n >= 1, least, "accumulate", "ema_every")
        check_entries(self, lambda x: 0 <= x < 1, "in [0, 1)", "ema_decay")
        places = ("device", "host")
        check_entries(self, places.__contains__, f"one of {places}", "moments")


class Report(NamedTuple):
    """Numbers of one step, still on the device: reading them waits for it.

    `aux` is the loss function's second result, summed over the microbatches.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    aux: Any


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    cfg: StepConfig,
    like: TrainState,
) -> Step:
    """A compiled (state, batch, key) -> (state, report), which consumes the old state.

    The key is the same for all steps: the number of updates is folded in. Steps whose
    loss or gradient is not finite leave weights, optimizer and average as they were, so
    a run with a bad batch ends like one without it.

    Args:
        rate: the learning rate, for the report.
        like: a state, or `abstract_state(...)`, whose layout the new states keep.

    Raises:
        ValueError: (when called) the rows of the batch can't be cut into microbatches.
    """

    def present(moments: Any) -> Any:
        """The moments on the devices, in the step."""
        if not any(map(sharding.is_parked, jax.tree.leaves(like.optimizer))):
            return moments
        where = sharding.on_devices(like.optimizer)
        return jax.device_put(moments, jax.tree.map(lambda x: x.sharding, where))

    def step(
        state: TrainState, batch: Any, key: Key[jax.Array, ""]
    ) -> tuple[TrainState, Report]:
        # Steps that were skipped count for nothing, neither for noise nor for rates.
        updates = state.step - state.skipped
        key = jax.random.fold_in(key, updates)
        frozen, state = state.frozen, state._replace(frozen=None)
        with sharding.float32_sums(cfg.float32_sums):
            value, aux, gradient = gradients(
                _beside(frozen, partial(loss, step=updates)),
                *(state.params, batch, key, cfg.accumulate),
            )
        norm = optax.tree.norm(gradient)
        keep = jnp.isfinite(value) & jnp.isfinite(norm)
        if cfg.skip_above is not None:
            keep &= value <= cfg.skip_above

        skipped = jnp.where(keep, state.skipped, state.skipped + 1)
        report = Report(value, norm, rate(updates), skipped, aux)

        # perf: a choice of the whole state; selections write every array once more.
        state = state._replace(optimizer=present(state.optimizer))
        update = partial(_update, optimizer, cfg, gradient)
        state = jax.lax.cond(keep, update, lambda state: state, state)
        state = state._replace(step=state.step + 1, skipped=skipped, frozen=frozen)
        return state, report

    placement = jax.tree.map(lambda x: x.sharding, like)
    devices = list(like.step.sharding.device_set)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placement, None),
        compiler_options=programs.overlap(devices) or None,
    )


def _beside(frozen: Any, loss: Loss) -> Loss:
    """The loss as a function of the weights that are trained."""
    if frozen is None:
        return loss
    return lambda params, *rest: loss(frozen | params, *rest)


def _update(
    optimizer: optax.GradientTransformation,
    cfg: StepConfig,
    gradient: Any,
    state: TrainState,
) -> TrainState:
    """The state with weights, average and moments after the gradient."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
        change, moments = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    updates = state.step - state.skipped
    average = partial(_average, _decay(cfg, updates // cfg.ema_every), params)
    if cfg.ema_every == 1:
        ema = average(state.ema)
    else:
        due = updates % cfg.ema_every == 0
        ema = jax.lax.cond(due, average, lambda ema: ema, state.ema)
    return state._replace(params=params, ema=ema, optimizer=moments)


def _average(decay: jax.Array, params: Any, ema: Any) -> Any:
    """The moving average of the weights, with new ones."""
    # In this form the average of what does not change does not change.
    return jax.tree.map(
        lambda mean, new: mean + (1 - decay) * (new.astype(jnp.float32) - mean),
        ema,
        params,
    )


def gradients(
    loss: Loss, params: Any, batch: Any, key: Key[jax.Array, ""], parts: int = 1
) -> tuple[Float[Array, ""], Any, Any]:
    """The loss of a batch cut into `parts` microbatches, the sum of aux, the gradient.

    Loss and gradient are those of the whole batch, whatever each microbatch weighs.

    Raises:
        ValueError: the rows of the batch can't be cut into `parts`.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    if parts == 1:  # perf: inside a loop XLA's convolutions on CPUs are 13 times slower
        first = jax.random.fold_in(key, 0)
        (value, aux), gradient = value_and_grad(params, batch, first)
        return value, aux, gradient

    def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        index, rows = part
        own_key = jax.random.fold_in(key, index)
        (value, aux), gradient = value_and_grad(params, rows, own_key)
        return jax.tree.map(
            lambda t, x: t + aux.weight * x, total, (value, gradient)
        ), aux

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    microbatches = jax.tree.map(lambda x: _cut(x, parts), batch)
    total, aux = jax.lax.scan(
        add, zeros, (jnp.arange(parts, dtype=jnp.int32), microbatches)
    )
    aux = jax.tree.map(lambda x: x.sum(axis=0), aux)
    whole = jnp.maximum(aux.weight, 1)  # there may be nothing in the rows
    value, gradient = jax.tree.map(lambda x: x / whole, total)
    return value, aux, gradient


def _cut(x: Array, parts: int) -> Array:
    """Microbatches that take every parts-th row, so that no row changes its device."""
    if x.shape[0] % parts:
        raise ValueError(
            f"a batch of {x.shape[0]} rows can't be cut into {parts} microbatches; "
            "make the batch a multiple of `accumulate`"
        )
    x = rearrange(x, "(rows parts) ... -> parts rows ...", parts=parts)
    return sharding.constrain(x, (None, "batch", *[None] * (x.ndim - 2)))


def _decay(cfg: StepConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The decay of the moving average after `updates` updates of it."""
    n = updates.astype(jnp.float32)
    bound = (1 + n) / (10 + n) if cfg.ema_warmup else jnp.float32(1)
    return jnp.minimum(jnp.float32(cfg.ema_decay), bound)
