# SPDX-License-Identifier: Apache-2.0
"""What pixels are: the conventions of the package, and how other images follow them.

Files and functions that touch them speak uint8 RGB, channels last; models see float32
in [-1, 1] (`to_model`, `to_uint8`). Transparent parts lie on white, and of 16 bits the
higher 8 count.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pyramid_jax.shapes import Array

HeightWidth = tuple[int, int]


def to_model(pixels: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """8-bit pixels as float32 in [-1, 1], the range the models work in."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_uint8(pixels: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Pixels in [-1, 1] rounded to 8 bits; values outside the range are clamped."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def array_image(array: Any) -> Image.Image:
    """An array of a user as an image: grey, RGB or RGBA, in 8 bits.

    Args:
        array: uint8, uint16, bool or floats in [0, 1], shape (h, w), (h, w, 1),
            (h, w, 3) or (h, w, 4); anything that numpy can make one of.

    Raises:
        ValueError: another type, shape or range.
    """
    pixels = np.asarray(array)
    kind, bits, shape = pixels.dtype.kind, 8 * pixels.dtype.itemsize, pixels.shape
    within, fits = "", (kind, bits) in (("b", 8), ("u", 8), ("u", 16))
    if kind == "f" and pixels.size:
        within = f" from {pixels.min():g} to {pixels.max():g}"
        fits = pixels.min() >= 0 and pixels.max() <= 1
    channels = shape[2:] if len(shape) in (2, 3) else None
    if not fits or not pixels.size or channels not in ((), (1,), (3,), (4,)):
        raise ValueError(
            f"the image is an array of {pixels.dtype}{within} and shape {shape}; "
            "expected (height, width, 3), or (height, width) if grey, or 4 channels "
            "with alpha, as uint8 in [0, 255], uint16 in [0, 65535] or floats in [0, 1]"
        )
    pixels = pixels[..., 0] if channels == (1,) else pixels
    eight = pixels >> (bits - 8) if kind == "u" else np.rint(pixels * np.float32(255))
    return Image.fromarray(eight.astype(np.uint8))


def over_white(image: Image.Image) -> Image.Image:
    """An image as RGB, its transparent parts on white.

    Raises:
        ValueError: a kind of image that has no 8-bit colours.
    """
    if image.mode[0] in "IF":  # more than 8 bits of grey, which Pillow would clip
        array, key = np.asarray(image), image.info.get("transparency")
        image = array_image(array)
        if key is not None:
            image.putalpha(array_image(array != key))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
