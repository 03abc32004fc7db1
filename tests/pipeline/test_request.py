# SPDX-License-Identifier: Apache-2.0
"""The words of a call: what is not given, what changes what, and what comes back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pyramid_jax.data import video_io
from pyramid_jax.model import PRESETS
from pyramid_jax.pipeline.folder import TINY
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.request import check_seed, check_text
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline, load

PROMPTS = ("a red circle", "a green star moves up")
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 1}


@pytest.fixture(scope="module")
def embedded() -> VideoPipeline:
    return load(TINY)


@pytest.fixture(scope="module")
def model(embedded: VideoPipeline) -> VideoPipeline:
    """The embedded model with as few steps as there can be."""
    two = (2,) * len(embedded.cfg.stages)
    options = replace(embedded.defaults, first_steps=two, video_steps=two)
    return replace(embedded, defaults=options)


def test_what_is_not_given_is_what_the_model_was_made_for(embedded: VideoPipeline):
    request = embedded.request("a ring")
    assert request.size == Size(32, 32, 8)
    assert request.options == embedded.defaults
    assert embedded.request("a ring", seconds=0.5).size.frames == 4


def test_steps_and_guidance_change_the_options_and_nothing_else(model: VideoPipeline):
    request = model.request(
        PROMPTS[0],
        **SIZE,
        num_inference_steps=4,
        video_num_inference_steps=(2, 3, 4),
        guidance_scale=6.0,
        video_guidance_scale=2.5,
    )
    guidance = replace(model.defaults.guidance, first=6.0, video=2.5)
    assert request.options == replace(
        model.defaults,
        first_steps=(4, 4, 4),
        video_steps=(2, 3, 4),
        guidance=guidance,
    )


def test_a_preset_changes_what_it_names(model: VideoPipeline):
    faithful, fast = (
        model.request(PROMPTS[0], **SIZE, preset=name).options for name in PRESETS
    )
    assert faithful == replace(model.defaults, last_step=True)
    assert fast == replace(model.defaults, last_step=False, reuse=True)
    with pytest.raises(ValueError, match=r"unknown preset 'slow'; use one of \['fa"):
        model.request(PROMPTS[0], **SIZE, preset="slow")


def test_videos_of_one_prompt_count_their_seeds_up(model: VideoPipeline):
    request = model.request(PROMPTS, **SIZE, seed=5, num_videos_per_prompt=2)
    assert request.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    two = model(PROMPTS[0], **SIZE, seed=7, num_videos_per_prompt=2).frames
    one = model(PROMPTS[0], **SIZE, seed=8).frames
    assert np.abs(two[1].astype(int) - one[0].astype(int)).max() <= 1  # rounding


def test_a_drawn_seed_is_said_and_makes_the_same_video_again(model: VideoPipeline):
    drawn = model(PROMPTS[0], **SIZE)
    again = model(PROMPTS[0], **SIZE, seed=drawn.seed)
    np.testing.assert_array_equal(drawn.frames, again.frames)
    assert f"seed {drawn.seed}" in repr(drawn)


def test_images_may_be_paths_pictures_or_pixels(model: VideoPipeline, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "first.png")
    files = tmp_path / "first.png", str(tmp_path / "first.png")
    kinds = (
        pixels,
        picture,
        (pixels / 255).astype(np.float32),
        jnp.asarray(pixels),
        *files,
    )
    one, *others = (model.request("a", image=x, **SIZE).image for x in kinds)
    assert one is not None and one.shape == (32, 32, 3)
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_frames_come_as_bytes_floats_or_pictures(model: VideoPipeline):
    size = SIZE | {"seed": 0}
    whole = model(PROMPTS[0], **size).frames
    floats = model(PROMPTS[0], **size, output="float32").frames
    assert floats.dtype == np.float32 and 0 <= floats.min() <= floats.max() <= 1
    np.testing.assert_array_equal(np.rint(floats * 255).astype(np.uint8), whole)
    ((picture,),) = model(PROMPTS[0], **size, output="pil").frames
    np.testing.assert_array_equal(np.asarray(picture), whole[0, 0])
    with pytest.raises(ValueError, match="output 'latent' is unknown; use one of"):
        model(PROMPTS[0], **size, output="latent")


def test_a_model_is_described_in_a_line(embedded: VideoPipeline):
    assert len(repr(embedded)) < 200
    assert "tiny: 2.0 M float32 weights, 32x32 up to 8 frames" in repr(embedded)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_frames": 3, "seconds": 1.0}, "not both"),
        ({"height": 32}, "give both, or neither"),
        ({"num_videos_per_prompt": 0}, "give at least one"),
        ({"num_inference_steps": (1, 2)}, "one entry for each of the 3 stages"),
    ],
)
def test_choices_that_make_no_sense_are_refused(
    embedded: VideoPipeline, choices: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        embedded.request("a ring", **choices)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63, 1.5, True, "1", None])
def test_seeds_that_would_share_a_video_are_refused(seed):
    with pytest.raises(ValueError, match="must be a whole number of 0 to 2147483647"):
        check_seed(seed)


def test_the_seeds_of_several_videos_stay_in_range(model: VideoPipeline):
    last = 2**31 - 2
    assert model.request(PROMPTS, seed=last).seed == last
    check_seed(np.int64(last))
    with pytest.raises(ValueError, match=r"0 to 2147483645 \(of 3 videos"):
        model.request("a", seed=last, num_videos_per_prompt=3)


@pytest.mark.parametrize("wrong", ["L\udcf6we", 3, None, b"a"])
def test_a_prompt_that_is_no_text_is_refused(wrong):
    with pytest.raises(ValueError, match=r"is (no text in UTF-8|a \w+, not a text)"):
        check_text(wrong)


def test_a_prompt_in_another_encoding_is_refused(model: VideoPipeline):
    for choices in (
        {"prompt": "L\udcf6we"},
        {"prompt": "a", "negative_prompt": "\udcf6"},
    ):
        with pytest.raises(ValueError, match="is no text in UTF-8"):
            model.request(**choices)


def test_videos_are_saved_by_their_suffix(tmp_path: Path):
    frames = np.zeros((2, 3, 32, 32, 3), np.uint8)
    frames[:, 1] = 200
    output = VideoOutput(frames, PROMPTS, seed=0, fps=8.0)
    files = output.save(tmp_path / "new" / "a.mp4")
    assert [file.name for file in files] == ["a_0.mp4", "a_1.mp4"]
    assert video_io.video_info(files[0]) == (32, 32, 3, 8.0)
    (gif,) = replace(output, frames=frames[:1], prompts=PROMPTS[:1]).save(
        tmp_path / "b.gif"
    )
    with Image.open(gif) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    with pytest.raises(ValueError, match="a png file holds one frame, each video has"):
        output.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none of the suffixes mp4, gif and png"):
        output.save(tmp_path / "a.avi")


@pytest.mark.parametrize(("count", "kind"), [(3, "video/mp4"), (1, "image/png")])
def test_a_notebook_shows_every_video_with_its_prompt(count: int, kind: str):
    frames = np.zeros((2, count, 32, 32, 3), np.uint8)
    view = VideoOutput(frames, ("a <ring>", "a star"), 0, 8.0)._repr_html_()
    assert view.count(f"data:{kind};base64,") == 2
    assert "a &lt;ring&gt;" in view and "a star" in view


def test_a_video_is_given_in_frames_of_whole_units(model: VideoPipeline):
    clip = np.random.default_rng(0).integers(0, 256, (3, 40, 32, 3), np.uint8)
    request = model.request(PROMPTS, video=clip, num_videos_per_prompt=2)
    assert request.video is not None and request.video.shape == (1, 3, 32, 32, 3)
    assert request.size == Size(32, 32, 3 + 8 - 1) and request.options.window == 7
    np.testing.assert_array_equal(request.video[0], clip[:, 4:-4])
    both = VideoOutput(np.stack([clip, clip + 1]), PROMPTS, 0, 8)
    request = model.request(PROMPTS, video=both, num_videos_per_prompt=2, seconds=1)
    assert request.video is not None and request.size.frames == 8
    corners = request.video[:, 0, 0, 0]
    added = np.uint8([[0], [0], [1], [1]])
    np.testing.assert_array_equal(corners, clip[0, 4, 0] + added)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"video": np.zeros((32, 32, 3))}, r"array of shape \(32, 32, 3\); expected"),
        ({"video": np.zeros((3, 2, 32, 32, 3))}, "3 videos for 2 prompts; give one"),
        ({"num_frames": 2}, "2 frames were asked for, but the video .* has 2; ask"),
        ({"image": np.zeros((32, 32, 3))}, "an image and a video were given"),
    ],
)
def test_a_video_that_cannot_be_continued_is_refused(
    model: VideoPipeline, choices: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        model.request(PROMPTS, **{"video": np.zeros((2, 32, 32, 3))} | choices)
