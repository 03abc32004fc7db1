# SPDX-License-Identifier: Apache-2.0
"""Everything that a training run changes, and how it is laid out over the devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from pyramid_jax import sharding

# key -> fresh weights, in boxes that carry their axes
Init = Callable[[jax.Array], Any]


class TrainState(NamedTuple):
    """Plain arrays, or their shapes.

    `skipped` of the `step` steps so far did not change the weights. `ema` is the
    float32 exponential moving average of the weights, for sampling. `frozen` weights
    are beside those that are trained, without an average or moments; None: there are
    none.
    """

    step: Int[Any, ""]
    skipped: Int[Any, ""]
    params: Any
    ema: Any
    optimizer: Any
    frozen: Any = None

    def averages(self) -> Any:
        """The average of the weights, with those that are frozen."""
        return self.ema if self.frozen is None else self.frozen | self.ema


def create_state(
    key: Key[Array, ""], init: Init, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A new state over the mesh, weights, average and optimizer moments sharded alike.

    No device ever holds more than its part.
    """
    build = partial(_boxed, init, optimizer)
    placement = sharding.shardings(jax.eval_shape(build, key), mesh)
    return jax.jit(lambda key: sharding.unbox(build(key)), out_shardings=placement)(key)


def abstract_state(
    init: Init, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes and shardings of a state, to restore into or to compile for."""
    shapes = jax.eval_shape(partial(_boxed, init, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(shapes),
        sharding.shardings(shapes, mesh),
    )


def with_moments(state: TrainState, place: str) -> TrainState:
    """The state, or its shapes, with the optimizer's moments on "device" or "host".

    Numbers that count updates stay where they are.
    """
    if place == "device":
        return state
    moments = jax.tree.map(
        lambda x: sharding.parked(x) if x.ndim else x, state.optimizer
    )
    return state._replace(optimizer=moments)


def _boxed(
    init: Init, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """A new state whose weights, average and moments carry their axes."""
    # The optimizer sees the boxes, so its moments carry the axes of their weights;
    # moments of plain arrays made inside jit would be replicated on every device.
    params = init(key)
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return TrainState(zero, zero, params, ema, optimizer.init(params))
