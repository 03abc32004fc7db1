# SPDX-License-Identifier: Apache-2.0
"""Convolutions over frames, rows and columns, channels last; one form per device.

Accelerators run the convolution as it is. XLA's CPU code for three dimensions is slow,
so there each frame of the kernel is a convolution of images, and the results are added.
CPU milliseconds of forward / forward and backward, 2 x 9 x 32 x 32 cells,
3 x 3 x 3 kernel, float32, JAX 0.10.2, two cores of a shared machine:

    channels   three dimensions   images      27 (9 wide) matrix products
           8       14 /  49        4 /  12        4 /  25   (3 /  12)
          16       27 /  98        5 /  24                  (7 /  25)
          32       56 / 201       19 /  51       48 / 248   (55 / 129)
          64      136 / 479      123 / 190                 (132 / 333)

The images also compile twice as fast as the best matrix products.
"""

from functools import partial

import jax
from einops import rearrange
from jaxtyping import Float

Strides = tuple[int, int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


def conv3d(
    x: Float[jax.Array, "b _ _ _ i"],
    kernel: Float[jax.Array, "kt kh kw i o"],
    strides: Strides = (1, 1, 1),
    padding: Padding = ((0, 0), (0, 0)),
) -> Float[jax.Array, "b _ _ _ o"]:
    """The convolution of a video with a kernel, in the dtype of both.

    Args:
        strides: of frames, rows and columns.
        padding: zeros before and after the rows, and the columns; frames get none.
    """
    window = {"strides": strides, "padding": padding}
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(conv_images, **window),
        default=partial(conv_video, **window),
    )


def conv_video(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding
) -> jax.Array:
    """`conv3d` as one convolution of three dimensions."""
    layout = ("NTHWC", "THWIO", "NTHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, ((0, 0), *padding), dimension_numbers=layout
    )


def conv_images(
    x: jax.Array, kernel: jax.Array, strides: Strides, padding: Padding
) -> jax.Array:
    """`conv3d` as the sum of one convolution of images for each frame of the kernel."""
    step, size = strides[0], kernel.shape[0]
    reach = (x.shape[1] - size) // step * step + 1
    total = None
    for first, image_kernel in enumerate(kernel):
        frames = x[:, first : first + reach : step]
        y = jax.lax.conv_general_dilated(
            rearrange(frames, "b t h w c -> (b t) h w c"),
            image_kernel,
            strides[1:],
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        total = y if total is None else total + y
    assert total is not None
    return rearrange(total, "(b t) h w c -> b t h w c", b=x.shape[0])
