# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that all Pallas kernels share: softmax over keys, a block at a time.

This is the running softmax of flash attention (arXiv:2205.14135), with powers of two.
`axis` is the axis of the keys; what is kept per query has size 1 there. Logits are
plain products q·k; `slope` turns them into powers of two. A query that has seen no key
has peak FLOOR and total 0. Hidden logits are so far below FLOOR that their weight is
exactly zero, so nothing is infinite and nothing has to be hidden twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pyramid_jax.kernels.tiles import Tiles
from pyramid_jax.mask import visible

Ref = Any  # an array in a kernel's memory, which Pallas gives no public type
Refs = Sequence[Ref]  # of one side, of results, or of scratch memory
Numbers = Sequence[Int[Array, "_ _"]]  # segments and frames of a block
Weigh = Callable[[Array, float, Array], Array]  # `weigh`, as a device does it best

FLOOR = -1e30
HIDDEN = -1e38  # far below FLOOR after any slope, and still finite


@dataclass(frozen=True)
class KernelCall:
    """What is fixed while kernels are traced; `interpret` is Pallas' own argument."""

    tiles: Tiles
    slope: float
    interpret: Any


def slope_of_logits(dim: int) -> float:
    """The factor that turns q·k into powers of 2."""
    return math.log2(math.e) / math.sqrt(dim)


def product(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "_ _"]:
    """Contracts one axis of each matrix; sums, and products of float32, are float32."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def hide(
    logits: Float[Array, "_ _"], query: Numbers, key: Numbers
) -> Float[Array, "_ _"]:
    """The logits, HIDDEN where the query does not see the key; queries on any axis."""
    return jnp.where(visible(query, key), logits, HIDDEN)


def weigh(
    logits: Float[Array, "_ _"], slope: float, less: Float[Array, "_ _"]
) -> Float[Array, "_ _"]:
    """2^(slope·logits - less)."""
    return jnp.exp2(logits * slope - less)


def advance(
    logits: Float[Array, "_ _"],
    slope: float,
    peak: Float[Array, "_ _"],
    total: Float[Array, "_ _"],
    axis: int,
    weigh: Weigh = weigh,
) -> tuple[Array, Array, Array, Array]:
    """Weights of this block, the factor that fades earlier sums, new peak and total."""
    higher = jnp.maximum(peak, logits.max(axis=axis, keepdims=True) * slope)
    weights, faded = weigh(logits, slope, higher), weigh(peak, 1.0, higher)
    return weights, faded, higher, total * faded + weights.sum(axis=axis, keepdims=True)


def finish(
    out: Float[Array, "_ _"], peak: Float[Array, "_ _"], total: Float[Array, "_ _"]
) -> tuple[Float[Array, "_ _"], Float[Array, "_ _"]]:
    """The output and the log-sum-exp (base 2); zeros for queries that saw no key."""
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    return out / total, jnp.where(blind, 0.0, peak + jnp.log2(total))
