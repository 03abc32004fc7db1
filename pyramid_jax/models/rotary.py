# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over one or several axes of a token's position."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from pyramid_jax.shapes import Array

BASE = 10_000.0


class Turns(NamedTuple):
    """How far each pair of head features of a token is turned."""

    cos: Float[Array, "b l r"]
    sin: Float[Array, "b l r"]


def angles(
    position: Float[Array, "b l axes"], dims: Sequence[int]
) -> Float[Array, "b l r"]:
    """The rotation angle of every pair of head features, r = sum(dims) / 2 pairs.

        angle_j = position · base^(-2j / dim),     j = 0 .. dim/2 - 1, axis after axis

    Args:
        position: one coordinate per axis; the leading axes of `dims` are used.
        dims: head features given to each axis; (64,) rotates by the frame alone,
            (16, 24, 24) by frame, y and x.

    Source: RoFormer (arXiv:2104.09864) eq. 15; the reference computes it in float64.
    """
    frequency = [BASE ** (-np.arange(0, dim, 2) / dim) for dim in dims]
    parts = [
        position[..., axis, None] * f.astype(np.float32)[None, None]
        for axis, f in enumerate(frequency)
    ]
    return jnp.concatenate(parts, axis=-1)


def turns(angle: Float[Array, "b l r"]) -> Turns:
    """The rotations by these angles."""
    return Turns(jnp.cos(angle), jnp.sin(angle))


def rotate(
    x: Float[Array, "b l heads dim"], by: Turns
) -> Float[Array, "b l heads dim"]:
    """Turns each neighbouring pair of head features, in float32."""
    pairs = rearrange(
        x.astype(jnp.float32), "b l heads (r two) -> two b l heads r", two=2
    )
    cos, sin = (part[:, :, None, :] for part in by)
    turned = jnp.stack(
        [cos * pairs[0] - sin * pairs[1], sin * pairs[0] + cos * pairs[1]]
    )
    return rearrange(turned, "two b l heads r -> b l heads (r two)").astype(x.dtype)
