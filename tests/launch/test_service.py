# SPDX-License-Identifier: Apache-2.0
"""What stands behind the web page, without the page: limits, uploads, results."""

import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.sample import outputs
from launch.sample.outputs import Render
from launch.web import service as web
from launch.web.service import Continuation, VideoService, WebForm
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.request import SEEDS
from pyramid_jax.pipeline.sizes import Size
from tests.painter import LAST, painter

MODEL = painter()
WISH = WebForm(prompt="a red circle moves left", size="32x32", frames=7)


@pytest.fixture
def service(tmp_path: Path) -> VideoService:
    (tmp_path / "uploads").mkdir()
    return VideoService(MODEL, tmp_path / "results", tmp_path / "uploads")


def uploaded(service: VideoService, name: str = "first.png", side: int = 40) -> Path:
    path = service.uploads / name
    Image.new("RGB", (side, side), "red").save(path)
    return path


def made(service: VideoService, **choices: Any) -> Render:
    return service.make(service.job(WISH._replace(**choices)))


def test_what_a_visitor_leaves_open_is_the_models_choice(service: VideoService):
    request = service.job(WISH).request
    assert request.size == Size(32, 32, 7)
    assert request.options == MODEL.defaults
    assert request.negative_prompts == ("",) and request.image is None


def test_what_a_visitor_chooses_is_kept(service: VideoService):
    wish = WISH._replace(
        size="32x64",
        frames=5,
        seed=7,
        negative=" dark ",
        first_steps=3,
        video_guidance=2.5,
        preset="fast",
    )
    request = service.job(wish).request
    assert request.size == Size(32, 64, 5)
    assert (request.seed, request.negative_prompts) == (7, ("dark",))
    assert request.options.first_steps == (3, 3)
    assert request.options.video_steps == MODEL.defaults.video_steps
    assert request.options.guidance.video == 2.5
    assert request.options.reuse and not request.options.last_step
    assert MODEL.defaults.last_step


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_left_open_is_new_each_time(
    service: VideoService, seed: int | None
):
    wish = WISH._replace(seed=seed)
    drawn = {service.job(wish).request.seed for _ in range(3)}
    assert len(drawn) > 1 and all(0 <= seed < SEEDS for seed in drawn)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", " ", "the prompt is empty"),
        ("prompt", "x" * (web.PROMPT + 1), "1001 characters; use at most 1000"),
        ("prompt", "half of a pair \ud800", "the prompt is not Unicode; type it again"),
        ("negative", "x" * (web.PROMPT + 1), "negative prompt has 1001 characters"),
        ("frames", 9, "32x32 with 9 frames was asked for, but painter was made for"),
        ("frames", 4, "4 frames are not 1 . a multiple of 2; use 3 or 5"),
    ],
)
def test_what_the_model_cannot_make_is_refused_in_words(
    service: VideoService, name: str, value: Any, message: str
):
    with pytest.raises(ValueError, match=message) as error:
        service.job(WISH._replace(**{name: value}))
    assert len(str(error.value)) < 300
    assert not service.folder.exists()


def test_a_size_without_videos_is_not_offered(service: VideoService):
    options = replace(MODEL.defaults, sizes=((64, 64, 1), (32, 32, 7)))
    some = replace(service, model=replace(MODEL, defaults=options))
    assert list(some.sizes()) == ["32x32"]
    none = replace(MODEL, defaults=replace(options, sizes=options.sizes[:1]))
    with pytest.raises(ValueError, match="painter names no size of videos"):
        replace(service, model=none).sizes()


def test_an_uploaded_image_brings_the_guidance_for_images(service: VideoService):
    image = uploaded(service)
    job = service.job(WISH._replace(image=str(image)))
    request = job.request
    assert job.image == image
    assert request.options == MODEL.defaults.with_image()
    assert request.options.guidance.video == 1.5


def test_no_path_that_a_visitor_names_is_read(service: VideoService, tmp_path: Path):
    uploaded(service)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40)).save(secret)
    link = service.uploads / "link.png"
    link.symlink_to(secret)
    paths = ["/etc/passwd", secret, service.uploads / "../secret.png", link]
    paths += [service.uploads, "", "file:///etc/passwd"]
    for path in paths:
        with pytest.raises(ValueError, match="was not uploaded; upload a file"):
            service.job(WISH._replace(image=path))


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile /etc/passwd\n",
        "#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        '<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
        "",
    ],
    ids=["concat", "playlist", "svg", "empty"],
)
def test_files_that_lead_to_others_are_no_images(service: VideoService, text: str):
    path = service.uploads / "first.png"
    path.write_text(text)
    with pytest.raises(ValueError, match="no image that can be read; use PNG, JPEG"):
        service.upload(path)


def test_images_of_other_formats_or_too_many_pixels_are_refused(
    service: VideoService, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match="no image that can be read"):
        service.upload(uploaded(service, "first.tiff"))
    monkeypatch.setattr(web, "PIXELS", 40 * 40)
    assert service.upload(uploaded(service)).name == "first.png"
    with pytest.raises(ValueError, match="41 x 41 pixels; use one of at most"):
        service.upload(uploaded(service, side=41))


def test_a_made_video_says_what_it_was_made_with(service: VideoService):
    seen: list[Progress] = []
    render = service.make(service.job(WISH._replace(seed=7)), seen.append)
    assert seen[-1] == LAST
    assert render.path.parent == service.folder
    assert render.path.name.endswith("_a_red_circle_moves_left_7.mp4")
    lines = web.recipe_text(render).splitlines()
    assert lines[:3] == [
        "prompt: a red circle moves left",
        "seed: 7",
        "size: 32x32, 7 frames, 8 per second",
    ]
    assert "steps: 10 + 10 for the first frame, 6 + 6 for later ones" in lines
    assert web.recipe_text(outputs.read(render.path)).splitlines() == lines


@pytest.mark.parametrize("prompt", ["a red circle moves up", " "])
def test_a_result_goes_on_as_it_was_made(service: VideoService, prompt: str):
    image = str(uploaded(service))
    earlier = made(
        service, image=image, video_steps=3, negative="dark", preset="fast", seed=200
    )
    longer = service.make(service.job(Continuation(earlier.path, prompt)))
    recipe = longer.recipe
    assert recipe.prompt == (prompt.strip() or WISH.prompt)
    assert recipe.frames == 13 and recipe.negative == "dark"
    assert recipe.options == dict(earlier.recipe.options) | {"window": 3}
    assert recipe.image and recipe.image.startswith(earlier.path.name)
    assert f"continues: {earlier.path.name}" in web.recipe_text(longer)
    again = service.job(Continuation(longer.path)).request
    assert (again.size, again.prompts) == (Size(32, 32, 19), (recipe.prompt,))
    given = again.video
    assert given is not None and given.shape == (1, 13, 32, 32, 3)


def test_only_results_that_are_not_long_yet_go_on(
    service: VideoService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = made(service).path
    link = service.folder / "link.mp4"
    link.symlink_to(path)
    refused = {link: "is a link", tmp_path / "gone.mp4": "does not say what it was"}
    for video, message in refused.items():
        with pytest.raises(ValueError, match=message):
            service.job(Continuation(video))
    monkeypatch.setattr(web, "LONGEST", 1)
    with pytest.raises(ValueError, match="has 7 frames already; one of at most 6"):
        service.job(Continuation(path))


def test_names_of_files_hold_nothing_but_letters_of_the_prompt(service: VideoService):
    render = made(service, prompt="../../ä\x00/etc <b>" + "z" * 99, seed=1)
    assert render.path.parent == service.folder
    assert render.path.name.split("_", 1)[1] == f"etc_b_{'z' * 34}_1.mp4"


def test_the_newest_results_come_first_and_old_ones_are_left_out(
    service: VideoService, monkeypatch: pytest.MonkeyPatch
):
    assert service.results() == []
    paths = [made(service, prompt=f"video {i}", seed=i).path for i in range(3)]
    for path, age in zip(paths, (2, 3, 1), strict=True):
        os.utime(path, (1000 - age, 1000 - age))
    (service.folder / ".hidden.mp4").write_bytes(paths[0].read_bytes())
    (service.folder / "other.mp4").write_bytes(b"not a video")
    assert [result.path for result in service.results()] == [
        paths[i] for i in (2, 0, 1)
    ]
    monkeypatch.setattr(web, "SHOWN", 2)
    assert [result.path for result in service.results()] == [paths[2], paths[0]]


def test_links_and_files_without_pictures_are_no_results(
    service: VideoService, tmp_path: Path
):
    secret = replace(service, folder=tmp_path / "secret")
    other, own = made(secret).path, made(service).path
    (service.folder / "link.mp4").symlink_to(other)
    (service.folder / "beside.mp4").write_bytes(own.read_bytes())
    outputs.beside(service.folder / "beside.mp4").symlink_to(outputs.beside(other))
    (service.folder / "gone.mp4").symlink_to(tmp_path / "gone.mp4")
    (service.folder / "folder.mp4").mkdir()
    damaged = service.folder / "damaged.mp4"
    damaged.write_bytes(own.read_bytes()[:400])
    outputs.beside(damaged).write_bytes(outputs.beside(own).read_bytes())
    assert [result.path for result in service.results()] == [own]
    with pytest.raises(ValueError, match="is a link; only files in the folder"):
        service.result(service.folder / "link.mp4")


def test_equal_requests_of_one_second_get_files_of_their_own(service: VideoService):
    assert made(service, seed=1).path != made(service, seed=1).path


def test_stills_are_small_pictures_of_first_frames(service: VideoService):
    render = made(service, size="32x64", frames=5, seed=100)
    still = web.still(render)
    assert still.shape == (128, 256, 3)
    assert np.abs(still.astype(int) - 100).max() <= 2
    assert web.still(render) is still
    other = made(service, size="32x64", frames=5, seed=200)
    os.replace(other.path, render.path)
    assert np.abs(web.still(render).astype(int) - 200).max() <= 2


def test_a_preview_is_a_small_animation_that_is_played_once():
    frames = np.stack([np.full((96, 512, 3), 40 * i, np.uint8) for i in range(3)])
    with Image.open(BytesIO(web.preview(frames, fps=8))) as film:
        assert film.format == "WEBP" and film.info["loop"] == 1
        assert (film.size, getattr(film, "n_frames", 1)) == ((256, 48), 3)
        film.seek(2)
        film.load()
        assert film.info["duration"] == 125
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - 80).max() <= 2
