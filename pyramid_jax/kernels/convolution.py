# SPDX-License-Identifier: Apache-2.0
"""Convolutions over time, height and width, channels last."""

import jax
from jaxtyping import Float

Strides = tuple[int, int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


def conv3d(
    x: Float[jax.Array, "b _ _ _ i"],
    kernel: Float[jax.Array, "kt kh kw i o"],
    strides: Strides = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0)),
) -> Float[jax.Array, "b _ _ _ o"]:
    """The convolution of frames, rows and columns with `kernel`, in the dtype of both.

    Args:
        padding: zeros before and after the rows, and the columns; frames get none.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((0, 0), *padding),
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
    )
