# SPDX-License-Identifier: Apache-2.0
"""Pixels of the models and images of users become 8-bit pixels by one rule."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pyramid_jax.data import pictures, pixels


def test_model_pixels_round_trip_exactly_and_are_clamped():
    codes = np.arange(256, dtype=np.uint8)
    values = pixels.to_model(codes)
    assert values.dtype == np.float32 and (values.min(), values.max()) == (-1, 1)
    np.testing.assert_array_equal(pixels.to_uint8(values), codes)
    np.testing.assert_array_equal(pixels.to_uint8(np.array([-3.0, 3.0])), [0, 255])
    # Half a step of 1/127.5 more or less is rounded to the nearest pixel.
    np.testing.assert_array_equal(pixels.to_uint8(values[1:-1] + 0.0035), codes[1:-1])
    np.testing.assert_array_equal(pixels.to_uint8(values[1:-1] - 0.0035), codes[1:-1])


COLOUR = np.full((4, 6, 3), (200, 30, 40), np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        COLOUR,
        COLOUR.astype(np.uint16) * 257,
        COLOUR.astype(">u2") * 257,
        (COLOUR / 255).astype(np.float32),
        (COLOUR / 255).astype(np.float16),
        COLOUR / 255,
        np.dstack([COLOUR, np.full((4, 6), 255, np.uint8)]),
        jnp.asarray(COLOUR),
        jnp.asarray((COLOUR / 255).astype(np.float32)),
        Image.fromarray(COLOUR),
    ],
)
def test_images_of_many_kinds_are_the_same_pixels(array):
    np.testing.assert_array_equal(pictures.fit_picture(array, (4, 6)), COLOUR)


def test_greys_and_bits_become_colours():
    grey = np.uint8([[0, 90], [128, 255]])
    for array in (grey, grey[..., None], grey / 255, grey.astype(np.uint16) << 8):
        read = pictures.fit_picture(array, (2, 2))
        np.testing.assert_array_equal(read, np.stack([grey] * 3, axis=-1))
    bits = pictures.fit_picture(grey > 100, (2, 2))
    np.testing.assert_array_equal(bits[..., 0], [[0, 0], [255, 255]])


def test_transparent_parts_of_arrays_become_white():
    clear = np.dstack([COLOUR, np.zeros((4, 6), np.uint8)])
    assert (pictures.fit_picture(clear, (4, 6)) == 255).all()


@pytest.mark.parametrize(
    ("array", "given"),
    [
        (COLOUR * 1.0, r"float64 from 30 to 200 and shape \(4, 6, 3\)"),
        (COLOUR / 127.5 - 1, "float64 from -0.7"),
        (np.full((4, 6, 3), np.nan), "float64 from nan to nan"),
        (COLOUR.astype(np.int32), "int32"),
        (jnp.ones((4, 6, 3), jnp.bfloat16), "bfloat16"),
        (COLOUR.transpose(2, 0, 1), r"uint8 and shape \(3, 4, 6\)"),
        (COLOUR[None], r"shape \(1, 4, 6, 3\)"),
        (COLOUR[..., :2], r"shape \(4, 6, 2\)"),
        (COLOUR[:0], r"shape \(0, 6, 3\)"),
        (np.float32(0.5), r"shape \(\)"),
        ([Image.fromarray(COLOUR)], r"shape \(1, 4, 6, 3\)"),
        (object(), "object"),
        (b"a.png", r"\|S5"),
    ],
)
def test_other_arrays_are_refused_with_what_they_are(array, given):
    with pytest.raises(ValueError, match=given + ".*expected .height, width, 3"):
        pictures.fit_picture(array, (4, 6))
