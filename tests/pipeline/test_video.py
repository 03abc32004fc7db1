# SPDX-License-Identifier: Apache-2.0
"""The front door, with a small untrained model: what goes in, what comes out."""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from launch import demo
from launch.moving_shapes import judge
from launch.pairs.judge import judge_pair
from pyramid_jax import sharding
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.data.video_io import read_video
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import initialise, model_config, sample_config
from pyramid_jax.pipeline import folder
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.folder import PAIRS, TINY
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline, load


@pytest.fixture(scope="module")
def model() -> VideoPipeline:
    """The smoke version of the embedded model, no weight of which is zero."""
    cfg = tiny.get_config("smoke")
    about = model_config(cfg.model.to_dict())
    init = jax.jit(partial(initialise, about))
    params = sharding.unbox(init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        tree,
        [
            x + 0.1 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )
    defaults = sample_config(cfg.sample.to_dict())
    return VideoPipeline(about, params, load_tokenizer(about.tokenizer), defaults)


PROMPTS = ("a red circle", "a green star moves up", "a ring", "a cross moves left")
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 3}


@pytest.fixture(scope="module")
def videos(model: VideoPipeline) -> np.ndarray:
    return model(PROMPTS, **SIZE, seed=5).frames


def test_every_prompt_gets_a_video_of_the_size(videos: np.ndarray):
    assert videos.shape == (4, 3, 32, 32, 3) and videos.dtype == np.uint8
    assert videos.std() > 1


def test_the_same_seed_gives_the_same_videos(model: VideoPipeline, videos: np.ndarray):
    again = model.text_to_video(PROMPTS, **SIZE, seed=5).frames
    np.testing.assert_array_equal(again, videos)
    assert (model(PROMPTS, **SIZE, seed=6).frames != videos).any()


def test_a_video_of_a_batch_is_that_of_its_prompt_alone(
    model: VideoPipeline, videos: np.ndarray
):
    alone = model(PROMPTS[3], **SIZE, seed=8).frames
    assert np.abs(alone[0].astype(int) - videos[3].astype(int)).max() <= 1  # rounding


def test_a_given_image_is_the_first_frame(model: VideoPipeline):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = model.image_to_video(image, PROMPTS[0], **SIZE).frames
    assert made.shape == (1, 3, 32, 32, 3)
    assert np.abs(made[0, 0].astype(int) - image.astype(int)).max() <= 1


def test_a_video_is_continued_as_it_was_begun(model: VideoPipeline, videos: np.ndarray):
    """From 8 bits; with another prompt it goes on differently."""
    longer = model.extend(videos[:, :2], PROMPTS, **SIZE, seed=5).frames
    np.testing.assert_array_equal(longer[:, :2], videos[:, :2])
    other = model.extend(videos[0, :2], PROMPTS[1:2] * 4, **SIZE, seed=5).frames
    np.testing.assert_array_equal(other[0, :2], videos[0, :2])
    near, far = (
        np.abs(made[0, 2].astype(float) - videos[0, 2]).mean()
        for made in (longer, other)
    )
    assert near < 2 and far > 2 * near


def test_an_image_is_a_video_of_one_frame(model: VideoPipeline):
    images = model.text_to_image(PROMPTS[0], height=32, width=32).frames
    assert images.shape == (1, 1, 32, 32, 3)


def test_without_guidance_the_negative_prompt_has_no_say(model: VideoPipeline):
    options = replace(model.defaults, guidance=Guidance(first=0, video=0))
    size = {"height": 32, "width": 32, "num_frames": 1, "seed": 0}
    one, two = (
        model(PROMPTS[0], negative_prompt=text, options=options, **size).frames
        for text in "xy"
    )
    np.testing.assert_array_equal(one, two)


def test_with_guidance_the_negative_prompt_matters(model: VideoPipeline):
    size = {"height": 32, "width": 32, "num_frames": 1, "seed": 0}
    one, two = (
        model(PROMPTS[0], negative_prompt=text, **size).frames
        for text in ("a red circle", "moves")
    )
    assert (one != two).any()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(30, 32, 3), r"height 30 is not a multiple of 16 = 1 .* use 16 or 32"),
        (Size(32, 40, 3), r"width 40 is not a multiple of 16 = 1 .* use 32 or 48"),
        (Size(32, 32, 0), r"0 frames are not 1 \+ a multiple of 1"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(
    model: VideoPipeline, size: Size, message: str
):
    with pytest.raises(ValueError, match=message):
        model(PROMPTS, height=size.height, width=size.width, num_frames=size.frames)


def test_frames_that_fill_no_unit_are_refused(model: VideoPipeline):
    layout = replace(model.cfg.layout, frames_per_unit=3)
    pairs = replace(model, cfg=replace(model.cfg, layout=layout))
    with pytest.raises(ValueError, match=r"3 latent frames are not 1 . a multiple"):
        pairs(PROMPTS, **SIZE)


def test_negative_prompts_must_be_one_or_one_each(model: VideoPipeline):
    with pytest.raises(ValueError, match="3 negative prompts for 4 prompts; give one"):
        model(PROMPTS, **SIZE, negative_prompt=["a", "b", "c"])


def test_no_prompt_is_refused(model: VideoPipeline):
    with pytest.raises(ValueError, match="there is no prompt"):
        model([], **SIZE)


def test_a_saved_model_is_read_back(model: VideoPipeline, tmp_path: Path):
    folder.save_model(
        tmp_path, model.cfg, model.defaults, sharding.to_host(model.params)
    )
    again = load(tmp_path)
    assert again.defaults == model.defaults
    assert again.cfg.dit == model.cfg.dit
    assert again.tokenize(PROMPTS[0]) == model.tokenize(PROMPTS[0])
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_damage_to_a_saved_model_is_listed(model: VideoPipeline, tmp_path: Path):
    weights = sharding.to_host(model.params)
    head = weights["dit"]["head"]
    broken = {
        **weights["dit"],
        "head": {"kernel": head["kernel"][:-1], "extra": jnp.ones(1)},
    }
    folder.save_model(tmp_path, model.cfg, model.defaults, {**weights, "dit": broken})
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert "dit/head/bias is missing" in str(error.value)
    assert "dit/head/extra is unknown" in str(error.value)
    assert "dit/head/kernel has shape (31, 48), expected (32, 48)" in str(error.value)


def test_a_missing_or_cut_off_model_is_refused(model: VideoPipeline, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"has no config.json of a model; copy this file"
    ):
        load(tmp_path)
    folder.save_model(
        tmp_path, model.cfg, model.defaults, sharding.to_host(model.params)
    )
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't be read"):
        load(tmp_path)


@pytest.mark.slow
def test_the_demo_shows_what_its_prompts_say(tmp_path: Path):
    model = load(PAIRS)
    sheet = demo.make(model, tmp_path, seed=0)
    assert sheet.stat().st_size > 10_000
    made = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert len(made) == len(demo.PROMPTS) + len(demo.FIRST_FRAMES)
    assert made[0] == "0_a_red_circle_moves_sideways_while_a_blue.mp4"
    video = read_video(tmp_path / made[0], (256, 256), 17, 8)[:, ::4, ::4]
    seen = {actor.colour: actor.kind for actor in judge_pair(video).actors}
    assert seen["red"] == "circle" and "blue" in seen


@pytest.mark.slow
def test_the_model_of_pixels_shows_what_its_prompt_says():
    model = load(TINY)
    (video,) = model("a red circle moves left", num_frames=8, seed=0).frames
    assert judge(video) == ("red", "circle", "left")


# ------------------------------------------------------------------- memory of devices

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def waiting() -> VideoPipeline:
    """A model with a VAE whose parts wait on the host; few steps."""
    model = load(PAIRS, offload=True)
    two = (2,) * len(model.cfg.stages)
    return replace(
        model, defaults=replace(model.defaults, first_steps=two, video_steps=two)
    )


@pytest.fixture(scope="module")
def resident(waiting: VideoPipeline) -> VideoPipeline:
    """The same model on the device."""
    there = load(PAIRS)
    return replace(there, defaults=waiting.defaults)


def on_devices() -> int:
    """Bytes of all arrays that are not on the host."""
    gc.collect()  # what earlier tests have left is not to go in between
    kinds = ((x.sharding.memory_kind, x.nbytes) for x in jax.live_arrays())
    return sum(size for kind, size in kinds if kind == sharding.DEVICE)


@pytest.mark.slow
def test_an_offloaded_model_makes_the_same_videos(
    waiting: VideoPipeline, resident: VideoPipeline
):
    short = {"num_frames": 9, "seed": 3}
    one, other = (m(PROMPT, **short).frames for m in (waiting, resident))
    np.testing.assert_array_equal(one, other)
    image = one[0, 0]
    one, other = (m(PROMPT, image=image, **short).frames for m in (waiting, resident))
    np.testing.assert_array_equal(one, other)


def test_a_stream_makes_the_frames_of_the_whole_video(waiting: VideoPipeline):
    short = {"num_frames": 5, "seed": 3}
    streamed = np.concatenate(list(waiting.stream(PROMPT, **short)), axis=1)
    whole = waiting(PROMPT, **short).frames
    assert np.abs(streamed.astype(int) - whole.astype(int)).max() <= 1  # rounding


@pytest.mark.slow
def test_a_stream_continues_a_video_through_the_autoencoder(resident: VideoPipeline):
    """Its units are sampled from what was encoded; frames that are given stay."""
    clip = resident(PROMPT, num_frames=9, seed=3)
    longer = resident.extend(clip, "a red circle moves up", num_frames=13, seed=4)
    stream = resident.stream("a red circle moves up", video=clip, num_frames=13, seed=4)
    streamed = np.concatenate(list(stream), axis=1)
    assert longer.frames.shape == (1, 13, 64, 64, 3)
    for frames in (longer.frames, streamed):
        np.testing.assert_array_equal(frames[:, :9], clip.frames)
    assert np.abs(streamed.astype(int) - longer.frames.astype(int)).max() <= 1
    step = np.abs(np.diff(longer.frames[0].astype(float), axis=0)).mean((1, 2, 3))
    assert step[8] < 3 * step[:8].mean()  # the first new frame goes on from the last


@pytest.mark.slow
def test_each_part_is_on_the_device_in_its_phase_alone_and_moves_once(
    waiting: VideoPipeline, monkeypatch: pytest.MonkeyPatch
):
    moved, seen = [], set()
    move = sharding.present

    def counted(tree: Any) -> Any:
        moved.append(sum(x.nbytes for x in jax.tree.leaves(tree)))
        return move(tree)

    waiting(PROMPT, num_frames=5)  # what programs keep for themselves is there now
    before = on_devices()
    monkeypatch.setattr(sharding, "present", counted)
    waiting(PROMPT, num_frames=5, callback_on_step_end=lambda _: seen.add(len(moved)))
    assert on_devices() == before
    assert waiting.vae is not None
    parts = [waiting.params[name] for name in ("text", "dit")]
    parts.append(waiting.vae.params["decoder"])
    assert moved == [sum(x.nbytes for x in jax.tree.leaves(part)) for part in parts]
    assert seen == {2}  # all steps are between the second move and the third


@pytest.mark.slow
def test_an_abandoned_stream_leaves_no_weights_on_the_device(waiting: VideoPipeline):
    before = on_devices()
    stream = waiting.stream(PROMPT, num_frames=5)
    next(stream)
    assert on_devices() > before
    del stream
    gc.collect()
    assert on_devices() == before


def test_the_plan_of_an_offloaded_model_has_nothing_that_waits(
    waiting: VideoPipeline, resident: VideoPipeline
):
    for name in ("waiting", "weights"):
        parked, present = (
            [getattr(phase, name) for phase in m.memory_plan(m.request(PROMPT)).phases]
            for m in (waiting, resident)
        )
        assert (parked == present) == (name == "weights")
        assert name == "weights" or not any(parked)


def test_work_that_does_not_fit_is_refused_before_it_begins(resident: VideoPipeline):
    reports: list[Progress] = []
    small = replace(resident, memory_limit=2**20)
    for make in (small, small.stream, small.latents):
        with pytest.raises(
            ValueError, match=r"GiB on a device, which lends 0\.0; load"
        ):
            make(PROMPT, callback_on_step_end=reports.append)
    assert not reports


def test_pieces_become_smaller_where_there_is_less_room(resident: VideoPipeline):
    alone = replace(resident.defaults, reuse=False)  # which would give way first
    request = resident.request(PROMPT, options=alone)
    most = max(phase.total for phase in resident.memory_plan(request).phases)
    roomy, tight = (
        replace(resident, memory_limit=limit) for limit in (most, most - 2**19)
    )
    plan = roomy.memory_plan(request)
    assert plan == resident.memory_plan(request)
    assert tight.memory_plan(request).phases[-1].total < plan.phases[-1].total


def test_the_plan_is_in_the_log(
    resident: VideoPipeline, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "pyramid_jax.pipeline.video")
    next(resident.stream(PROMPT))
    assert "MiB of a device" in caplog.text
