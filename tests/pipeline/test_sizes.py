# SPDX-License-Identifier: Apache-2.0
"""A model makes what it was made for, and says what that is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs import pairs
from launch.sizes import check_trained, height_width
from pyramid_jax.convert import convert
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import (
    MMDIT,
    ModelConfig,
    SampleConfig,
    model_config,
    sample_config,
)
from pyramid_jax.pipeline import sizes
from pyramid_jax.pipeline.folder import PAIRS, TINY
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline, load
from pyramid_jax.train import data_config, made_for


def released(variant: str) -> VideoPipeline:
    """A released model without its weights, which sizes do not need."""
    cfg = ModelConfig(MMDIT, Layout(), LatentConfig())
    defaults = convert.recommended_sampling(variant)
    tokenize = load_tokenizer(cfg.tokenizer)
    return VideoPipeline(cfg, None, tokenize, defaults, name=variant)


SMALL, LARGE, IMAGES = (
    released(f"diffusion_transformer_{name}") for name in ("384p", "768p", "image")
)
UNKNOWN = replace(SMALL, defaults=SampleConfig())


def size_of(
    model: VideoPipeline,
    size: tuple[int | None, int | None] = (None, None),
    count: int | None = None,
) -> Size:
    """The size of a request, if the model was made for it."""
    chosen = sizes.default_size(model.cfg, model.defaults, *size, count)
    check_trained(model.defaults, chosen, model.name)
    return chosen


def nearest_frames(model: VideoPipeline, seconds: float) -> int:
    return sizes.nearest_frames(seconds, model.cfg, model.defaults)


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (SMALL, Size(384, 640, 121)),
        (LARGE, Size(768, 1280, 121)),  # 5 seconds, though it makes 10
        (IMAGES, Size(1024, 1024, 1)),
    ],
    ids=["384p", "768p", "image"],
)
def test_nothing_given_is_the_favourite_size_and_at_most_five_seconds(
    model: VideoPipeline, chosen: Size
):
    assert size_of(model) == chosen


def test_released_models_say_what_they_make():
    assert [str(size) for size in LARGE.sizes] == ["768x1280 up to 241 frames (10 s)"]
    assert str(IMAGES.sizes[-1]) == "1280x768 (images)"


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.01, 1), (0.5, 9), (1, 25), (5, 121), (10, 241)]
)
def test_seconds_become_the_nearest_number_of_frames(seconds: float, frames: int):
    assert nearest_frames(SMALL, seconds) == frames


def test_no_other_number_of_frames_is_nearer():
    makeable = 1 + 8 * np.arange(40)
    for seconds in np.linspace(0.1, 10, 57):
        chosen = nearest_frames(SMALL, float(seconds))
        nearest = np.abs(makeable - seconds * 24).min()
        assert abs(chosen - seconds * 24) == pytest.approx(nearest)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_no_length_is_refused(seconds: float):
    with pytest.raises(ValueError, match="positive"):
        nearest_frames(SMALL, seconds)


@pytest.mark.parametrize(
    ("model", "size", "count"),
    [
        (SMALL, (768, 1280), None),
        (SMALL, (640, 384), None),
        (SMALL, (384, 640), 129),
        (LARGE, (384, 640), 121),
        (IMAGES, (1024, 1024), 9),
    ],
)
def test_what_no_checkpoint_supports_is_refused_with_what_is_allowed(
    model: VideoPipeline, size: tuple[int, int], count: int | None
):
    with pytest.raises(ValueError, match="was made for") as raised:
        size_of(model, size, count)
    assert all(size.name in str(raised.value) for size in model.sizes)


def test_any_size_allows_what_the_layers_have_a_shape_for():
    assert SMALL.request("a", height=256, width=448, num_frames=17).size == Size(
        256, 448, 17
    )
    with pytest.raises(ValueError, match="use 384 or 448"):
        SMALL.request("a", height=400, width=640)
    with pytest.raises(ValueError, match="use 17 or 25"):
        SMALL.request("a", height=384, width=640, num_frames=20)


def test_a_model_that_does_not_say_its_sizes_makes_any_but_chooses_none():
    assert size_of(UNKNOWN, (256, 256), 9) == Size(256, 256, 9)
    assert UNKNOWN.sizes == ()
    with pytest.raises(ValueError, match="give height and width"):
        size_of(UNKNOWN)


@pytest.mark.parametrize("text", ["384", "384x", "ax640", "384x640x3", "-64x64"])
def test_a_size_that_is_none_is_refused(text: str):
    assert height_width("384x640") == (384, 640)
    with pytest.raises(ValueError, match="is not HEIGHTxWIDTH"):
        height_width(text)


def test_a_given_first_frame_has_guidance_of_its_own():
    assert SMALL.defaults.guidance.video == 5.0
    assert SMALL.defaults.with_image().guidance.video == 4.0
    assert IMAGES.defaults.guidance.first == 9.0
    assert UNKNOWN.defaults.with_image() == UNKNOWN.defaults


def test_a_trained_model_was_made_for_the_sizes_of_its_data():
    cfg = pairs.get_config()
    model = model_config(cfg.model.to_dict())
    data = replace(data_config(cfg, model), sizes=((64, 96),), frames=18)
    made = made_for(sample_config(cfg.sample.to_dict()), data, model.latent)
    assert made.sizes == ((64, 64, 17), (64, 96, 17)) and made.fps == 8.0


@pytest.mark.parametrize(("folder", "side"), [(TINY, 32), (PAIRS, 64)])
def test_the_embedded_models_say_what_they_make(folder: Any, side: int):
    model = load(folder)
    assert model.name == folder.name
    assert size_of(model).height == side and model.defaults.fps == 8.0
