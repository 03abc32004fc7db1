# SPDX-License-Identifier: Apache-2.0
"""Sizes and statistics of latents."""

import numpy as np
import pytest

from pyramid_jax.latents import LatentConfig

RELEASED = LatentConfig()
PIXELS = LatentConfig(channels=3, spatial=1, temporal=1)


def test_sizes_of_the_released_models():
    assert RELEASED.grid(384, 640, patch=2, stages=3) == (48, 80)
    assert RELEASED.grid(768, 1280, patch=2, stages=3) == (96, 160)
    assert [RELEASED.frames(n) for n in (1, 9, 121, 241)] == [1, 2, 16, 31]


def test_a_model_in_pixel_space_has_one_cell_per_pixel_and_one_latent_per_frame():
    assert PIXELS.grid(48, 64, patch=4, stages=2) == (48, 64)
    assert [PIXELS.frames(n) for n in (1, 2, 17)] == [1, 2, 17]


def test_the_longest_video_of_at_most_so_many_frames():
    assert [RELEASED.longest(n) for n in (1, 8, 9, 16, 17)] == [1, 1, 9, 9, 17]
    assert PIXELS.longest(8) == 8


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (400, 640),
            "height 400 is not a multiple of 64 = 8 (latent cell) x 2 (patch) "
            "x 4 (pyramid); use 384 or 448",
        ),
        (
            (384, 100),
            "width 100 is not a multiple of 64 = 8 (latent cell) x 2 (patch) "
            "x 4 (pyramid); use 64 or 128",
        ),
        (
            (0, 640),
            "height 0 is not a multiple of 64 = 8 (latent cell) x 2 (patch) "
            "x 4 (pyramid); use 64 or 128",
        ),
    ],
)
def test_a_size_that_does_not_fit_the_pyramid_is_refused_with_advice(size, message):
    with pytest.raises(ValueError) as error:
        RELEASED.grid(*size, patch=2, stages=3)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (120, "120 frames are not 1 + a multiple of 8; use 113 or 121"),
        (0, "0 frames are not 1 + a multiple of 8; use 1 or 9"),
        (-3, "-3 frames are not 1 + a multiple of 8; use 1 or 9"),
    ],
)
def test_a_length_that_does_not_fit_is_refused_with_advice(frames, message):
    with pytest.raises(ValueError) as error:
        RELEASED.frames(frames)
    assert str(error.value) == message


def test_a_later_part_of_a_video_has_no_frame_of_its_own():
    assert [RELEASED.frames(n, begins=False) for n in (8, 24)] == [1, 3]
    with pytest.raises(ValueError, match="9 frames are not a multiple of 8; use 8 or"):
        RELEASED.frames(9, begins=False)


def test_a_size_without_a_pyramid_needs_whole_cells_only():
    assert RELEASED.grid(24, 8) == (3, 1)
    with pytest.raises(ValueError, match="height 12 is not a multiple of 8; use 8 or"):
        RELEASED.grid(12, 8)


@pytest.mark.parametrize("name", ["channels", "spatial", "temporal"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0 must be 1 or more"):
        LatentConfig(**{name: 0})


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_denormalising_undoes_normalising(leading):
    raw = np.random.default_rng(0).normal(size=(*leading, 3, 2, 4, 5))
    raw = raw.astype(np.float32)
    latent = RELEASED.normalise(raw)
    assert latent.dtype == np.float32
    np.testing.assert_allclose(RELEASED.denormalise(latent), raw, rtol=0, atol=1e-6)


def test_the_first_frame_has_the_statistics_of_images_and_the_others_of_videos():
    latent = RELEASED.normalise(np.ones((3, 1, 1, 1), np.float32)).ravel()
    image, video = (1 - 0.1490) / 1.8415, (1 + 0.2343) / 3.0986
    np.testing.assert_allclose(latent, [image, video, video], rtol=1e-6)


def test_an_image_is_a_first_frame():
    raw = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    video = RELEASED.normalise(raw)
    np.testing.assert_array_equal(RELEASED.normalise(raw[:1]), video[:1])
