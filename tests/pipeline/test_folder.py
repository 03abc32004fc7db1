# SPDX-License-Identifier: Apache-2.0
"""A converted model makes videos: small, from the original's exact layout of files."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pyramid_jax
from pyramid_jax import sharding
from pyramid_jax.convert.convert import convert_model
from pyramid_jax.convert.source import ReleasedFolder
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.prompts import PromptEncoder
from pyramid_jax.pipeline.video import VideoPipeline
from tests import original_files

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 9, "seed": 0}
ONE = (1, 1, 1)
QUICK = SampleConfig(first_steps=ONE, video_steps=ONE)
PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    theirs = original_files.write(tmp_path_factory.mktemp("theirs"), "mmdit")
    ours = tmp_path_factory.mktemp("ours")
    convert_model(ReleasedFolder(theirs), ours)
    return ours


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoPipeline:
    return pyramid_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def video(model: VideoPipeline) -> np.ndarray:
    return model.text_to_video(PROMPT, **SIZE, options=QUICK).frames


def test_a_converted_model_makes_videos(video: np.ndarray):
    assert video.shape == (1, 9, 64, 64, 3)
    assert video.dtype == np.uint8 and video.std() > 0


def test_videos_can_begin_with_an_image(model: VideoPipeline, video: np.ndarray):
    videos = model.image_to_video(video[0, 3], PROMPT, **SIZE, options=QUICK)
    assert videos.frames.shape == video.shape


@pytest.mark.slow
def test_every_video_of_a_batch_draws_its_own_first_frame(
    model: VideoPipeline, video: np.ndarray
):
    image = video[0, 3]
    choices = SIZE | {"image": image, "options": QUICK}
    both = model([PROMPT, PROMPT], **choices | {"seed": 3}).frames
    alone = model(PROMPT, **choices | {"seed": 4}).frames
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert (both[0, 0] != both[1, 0]).any()


class Heard(Exception):
    """Carries the texts that an encoder was given."""


class Listener(PromptEncoder):
    """Tells what it is given, and encodes nothing."""

    def __call__(self, texts):
        raise Heard(texts)


def test_prompts_are_finished_and_led_away_from_what_the_original_avoids(
    model: VideoPipeline,
):
    assert model.prompts is not None
    listening = replace(model, prompts=Listener(**vars(model.prompts)))

    def heard(prompts: str | list[str], **how: Any) -> list[str]:
        with pytest.raises(Heard) as told:
            listening.text_to_image(prompts, height=64, width=64, **how)
        return told.value.args[0]

    ending = ", hyper quality, Ultra HD, 8K"
    assert heard(PROMPT) == [prompts.NEGATIVE, PROMPT + ending]
    assert heard(PROMPT, negative_prompt="x") == ["x", PROMPT + ending]
    unguided = replace(QUICK, guidance=Guidance(first=0.0))
    both = heard([PROMPT, "a"], options=unguided)
    assert both == [PROMPT + ending, f"a{ending}"]


def test_weights_can_be_kept_in_bfloat16_or_widened(folder: Path, model: VideoPipeline):
    half = pyramid_jax.load(folder)
    assert half.vae is not None and half.prompts is not None
    trees = (half.params, half.vae.params, half.prompts.networks[0].params)
    assert {x.dtype.name for x in jax.tree.leaves(trees)} == {"bfloat16"}
    assert half.cfg.dit.dtype == half.vae.cfg.dtype == "bfloat16"
    eight = pyramid_jax.load(folder, dtype="int8", text=False)
    assert (eight.cfg.dit.dtype, eight.cfg.dit.precision) == ("bfloat16", "int8")
    assert eight.params["dit"]["head"]["kernel"].dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"float32"}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype(jnp.float32), y),
        half.params,
        model.params,
    )


def test_devices_that_share_a_model_hold_their_parts(folder: Path):
    mesh = sharding.device_mesh(data=2, fsdp=4)
    shared = pyramid_jax.load(folder, mesh, text=False)
    kernel = shared.params["dit"]["double"]["video"]["mlp_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 256)
    assert kernel.shape == (1, 64, 256)


def test_models_without_text_encoders_say_what_is_missing(folder: Path):
    model = pyramid_jax.load(folder, dtype="float32", text=False)
    assert model.prompts is None
    with pytest.raises(ValueError, match="features of T5 and CLIP, which are not load"):
        model.text_to_video(PROMPT, **SIZE)


def test_models_without_a_vae_make_latents_and_say_what_is_missing(
    model: VideoPipeline, folder: Path, tmp_path: Path
):
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    shutil.rmtree(bare / "vae")
    assert pyramid_jax.load(bare, text=False).vae is None
    bare_model = replace(model, vae=None)
    latents = bare_model.latents(PROMPT, **SIZE, options=QUICK)
    assert latents.shape == (1, 2, 8, 8, 16)
    with pytest.raises(ValueError, match="no VAE to decode with"):
        bare_model.text_to_video(PROMPT, **SIZE, options=QUICK)


def test_the_package_has_only_what_it_says():
    with pytest.raises(AttributeError, match="no attribute lode"):
        _ = pyramid_jax.lode
