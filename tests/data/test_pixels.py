# SPDX-License-Identifier: Apache-2.0
"""Pixels of the models and images of users become 8-bit pixels by one rule."""

import numpy as np

from pyramid_jax.data import pixels as pixels_


def test_model_pixels_round_trip_exactly_and_are_clamped():
    pixels = np.arange(256, dtype=np.uint8)
    values = pixels_.to_model(pixels)
    assert values.dtype == np.float32 and (values.min(), values.max()) == (-1, 1)
    np.testing.assert_array_equal(pixels_.to_uint8(values), pixels)
    np.testing.assert_array_equal(pixels_.to_uint8(np.array([-3.0, 3.0])), [0, 255])
    # Half a step of 1/127.5 more or less is rounded to the nearest pixel.
    np.testing.assert_array_equal(pixels_.to_uint8(values[1:-1] + 0.0035), pixels[1:-1])
    np.testing.assert_array_equal(pixels_.to_uint8(values[1:-1] - 0.0035), pixels[1:-1])
