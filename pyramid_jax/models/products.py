# SPDX-License-Identifier: Apache-2.0
"""Products with weights whose gradients devices add up in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def cast_inputs(x: jax.Array, kernel: jax.Array, bias: Any, *, dtype: Any) -> Any:
    """Inputs and bias in `dtype`; the kernel stays float32 until it is multiplied."""
    return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def summed_product(
    x: jax.Array, kernel: jax.Array, axes: Any, precision: Any
) -> jax.Array:
    """`dot_general` whose kernel has a float32 gradient."""
    assert precision is None
    return _dot(x, kernel, len(axes[0][0]))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, kernel: jax.Array, contract: int) -> jax.Array:
    """The product over the last `contract` axes of `x`, in its type."""
    return jnp.tensordot(x, kernel.astype(x.dtype), contract)


def _dot_forward(x: jax.Array, kernel: jax.Array, contract: int) -> Any:
    return _dot(x, kernel, contract), (x, kernel)


def _dot_backward(contract: int, kept: Any, y: jax.Array) -> Any:
    x, kernel = kept
    rows, outputs = tuple(range(x.ndim - contract)), range(contract, kernel.ndim)
    pairs = tuple(range(x.ndim - contract, y.ndim)), tuple(outputs)
    # Devices add up what this product returns, so its type is that of the sum.
    own = jnp.tensordot(x, y, (rows, rows), preferred_element_type=jnp.float32)
    return jnp.tensordot(y, kernel.astype(y.dtype), pairs), own


_dot.defvjp(_dot_forward, _dot_backward)
