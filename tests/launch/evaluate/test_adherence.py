# SPDX-License-Identifier: Apache-2.0
"""Adherence counts what videos show, over windows, beside real clips and chance."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import __main__, adherence
from launch.evaluate.adherence import adherence_table, compared, sampled, windows
from launch.evaluate.judges import JUDGES
from launch.sample import choices
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.video import VideoPipeline

SHAPES, PAIRS = JUDGES["shapes"], JUDGES["pairs"]


@pytest.fixture
def requests(model: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> list:
    """What the model is asked for, whose videos show the number of the call."""
    made: list = []

    def run(self, request):
        made.append(request)
        size, prompts = request.size, request.prompts
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        frames = np.full(shape, len(made), np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", run)
    monkeypatch.setattr(choices, "load", lambda *_, **__: model)
    return made


# ----------------------------------------------------------------------------- counting


def test_real_shapes_are_right_and_those_of_other_captions_wrong():
    asked = SHAPES.ask(12, 0, 8, False)
    assert len({each.text for each in asked}) == 12
    clips = [each.real for each in asked]
    assert set(adherence.adherence(SHAPES, clips, asked).values()) == {12}
    turned = [*asked[1:], *asked[:1]]
    assert adherence.adherence(SHAPES, clips, turned)["all"] == 0


def test_noise_scores_nothing():
    asked = SHAPES.ask(6, 0, 8, False)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 32, 32, 3), np.uint8)
    assert set(adherence.adherence(SHAPES, [*noise], asked).values()) == {0}


def test_real_pairs_show_what_their_captions_say():
    asked = PAIRS.ask(3, 2, 17, False)
    clips = [each.real for each in asked]
    assert adherence.adherence(PAIRS, clips, asked)["all"] >= 2
    black = [np.zeros_like(clip) for clip in clips]
    assert adherence.adherence(PAIRS, black, asked)["all"] == 0


def test_images_have_no_motion():
    image = PAIRS.ask(2, 2, 1, False)
    counts = adherence.adherence(PAIRS, [each.real for each in image], image)
    assert list(counts) == ["colours", "kinds", "all"] and counts["colours"] == 2


def test_wide_pairs_are_wide():
    assert {each.real.shape[1:3] for each in PAIRS.ask(2, 2, 1, True)} == {(64, 96)}


def test_windows_end_with_the_video_and_share_a_frame():
    assert windows(1, 17) == [(0, 1)] and windows(17, 17) == [(0, 17)]
    assert windows(49, 17) == [(0, 17), (16, 33), (32, 49)]


def test_model_real_clips_and_chance_are_compared_in_every_window():
    asked, others = (PAIRS.ask(2, seed, 33, False) for seed in (2, 3))
    still = [np.repeat(each.real[:1], 33, axis=0) for each in asked]
    rows = compared(PAIRS, still, asked, others)
    assert list(rows) == [
        "model, frames 0 to 16",
        "real clips, frames 0 to 16",
        "model, frames 16 to 32",
        "real clips, frames 16 to 32",
        "chance",
    ]
    model, real, chance = (rows[name] for name in [*list(rows)[:2], "chance"])
    assert model["right"]["motions"] == 0 < real["right"]["motions"]
    assert chance["right"]["all"] == 0
    assert model["frechet"] > real["frechet"] > 0


def test_the_table_has_rates_intervals_and_distances():
    right = {"colours": 3, "kinds": 2, "all": 1}
    rows = {"model": {"right": right, "frechet": 1.5}, "chance": {"right": right}}
    lines = adherence_table(rows, 4).splitlines()
    assert lines[0] == "| 4 captions | colours | kinds | all | Fréchet distance |"
    assert lines[2].startswith("| model | 75.0% (30.1% to 95.4%) | 50.0%")
    assert lines[2].endswith("| 1.500 |") and lines[3].endswith("|  |")


# ----------------------------------------------------------------------------- sampling


def test_every_caption_is_sampled_once_in_batches_of_one_size(given, model, requests):
    asked = SHAPES.ask(3, 2, 8, False)
    options = given("--batch=2", "--seed=4", "--video_guidance=3", "--steps=5")
    videos = sampled(model, asked, 5, options)
    assert [len(request.prompts) for request in requests] == [2, 2]
    assert [video[0, 0, 0, 0] for video in videos] == [1, 1, 2]
    assert [request.seed for request in requests] == [4, 6]
    assert requests[1].prompts[0] == asked[2].text and requests[0].image is None
    assert requests[0].options.guidance.video == 3
    assert requests[0].options.first_steps == (5, 5, 5)


def test_image_to_video_gives_every_video_its_first_frame(given, model, requests):
    asked = PAIRS.ask(3, 2, 5, False)
    sampled(model, asked, 5, given("--task=i2v"))
    for request, each in zip(requests, asked, strict=True):
        assert request.prompts == (each.text,)
        np.testing.assert_array_equal(request.image, each.real[0])


@pytest.mark.parametrize(
    ("arguments", "frames"),
    [([], 17), (["--frames=5"], 5), (["--seconds=0.6"], 5), (["--task=t2i"], 1)],
)
def test_a_run_prints_a_table_and_writes_json(
    arguments, frames: int, given, requests, tmp_path: Path, capsys
):
    to = tmp_path / "numbers.json"
    __main__.evaluate(given("--captions=3", f"--to={to}", *arguments))
    report = json.loads(to.read_text())
    assert [request.size.frames for request in requests] == [frames]
    assert (report["frames"], report["captions"]) == (frames, 3)
    assert report["rows"]["model"]["right"]["all"] == 0
    assert report["rows"]["real clips"]["right"]["all"] >= 2
    out = capsys.readouterr().out
    assert "| real clips | 100.0% (43.9% to 100.0%) |" in out and "| chance |" in out


def test_sizes_that_the_model_was_not_made_for_are_refused(given, model, requests):
    with pytest.raises(ValueError, match="32x32 with 17 frames was asked for"):
        __main__.evaluate(given("--captions=2", "--size=32x32"))
    assert not requests
    asked = SHAPES.ask(2, 0, 8, False)
    sampled(model, asked, 5, given("--size=32x32", "--any_size"))
    assert requests[0].size.height_width == (32, 32)
