# SPDX-License-Identifier: Apache-2.0
"""What stands behind the web page, without the page: limits, uploads, results."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from configs import tiny_latent
from launch.sample import outputs
from launch.web import studio as web
from launch.web.studio import Studio, WebForm
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.model import SampleConfig, model_config
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.video import Size, VideoPipeline

LAST = Progress(unit=3, units=4, stage=1, stages=2, step=5, steps=6, done=1.0)


@dataclass(frozen=True)
class Painter(VideoPipeline):
    """The embedded model without weights: videos are one colour, the seed's."""

    def text_to_video(
        self, prompts: str | Sequence[str], size: Size, *, seed: int = 0, **choices: Any
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        if self.watch is not None:
            self.watch(LAST._replace(step=4))
            self.watch(LAST)
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        return np.full(shape, seed % 256, np.uint8)


def painter() -> Painter:
    about = model_config(tiny_latent.get_config().model.to_dict())
    made = SampleConfig(
        first_steps=(10, 10),
        video_steps=(6, 6),
        image_guidance=1.5,
        sizes=((32, 32, 7), (32, 64, 5)),
        fps=8.0,
    )
    return Painter(about, None, load_tokenizer(about.tokenizer), made, name="painter")


MODEL = painter()
WISH = WebForm(prompt="a red circle moves left", size="32x32", frames=7)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "uploads").mkdir()
    return Studio(MODEL, tmp_path / "results", tmp_path / "uploads")


def uploaded(studio: Studio, name: str = "first.png", side: int = 40) -> Path:
    path = studio.uploads / name
    Image.new("RGB", (side, side), "red").save(path)
    return path


def test_what_a_visitor_leaves_open_is_the_models_choice(studio: Studio):
    request = studio.request(WISH)
    assert request.size == Size(32, 32, 7)
    assert request.options == MODEL.defaults
    assert request.negative is None and request.image is None


def test_what_a_visitor_chooses_is_kept(studio: Studio):
    wish = WISH._replace(
        size="32x64",
        frames=5.0,
        seed=7,
        negative=" dark ",
        first_steps=3,
        video_guidance=2.5,
    )
    request = studio.request(wish)
    assert request.size == Size(32, 64, 5)
    assert (request.seed, request.negative) == (7, "dark")
    assert request.options is not None
    assert request.options.first_steps == (3, 3)
    assert request.options.video_steps == MODEL.defaults.video_steps
    assert request.options.guidance.video == 2.5


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_left_open_is_new_each_time(studio: Studio, seed: int | None):
    drawn = {studio.request(WISH._replace(seed=seed)).seed for _ in range(3)}
    assert len(drawn) > 1 and all(0 <= seed < web.SEEDS for seed in drawn)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", " ", "the prompt is empty"),
        ("prompt", "x" * (web.PROMPT + 1), "1001 characters; use at most 1000"),
        ("negative", "x" * (web.PROMPT + 1), "negative prompt has 1001 characters"),
        ("size", "4096x4096", "size '4096x4096': expected one of 32x32, 32x64"),
        ("size", "x" * 10**6, "size 'xxxxxxxxxxxxxxxxxxxx"),
        ("size", ["32x32"], r"size \['32x32'\]: expected one of"),
        ("frames", 9, "frames 9: expected a number from 1 to 7"),
        ("frames", 4, "4 frames are not 1 . a multiple of 2; use 3 or 5"),
        ("frames", 2.5, "frames 2.5: expected a whole number"),
        ("frames", float("nan"), "frames nan: expected a number"),
        ("frames", "7", "frames '7': expected a number"),
        ("frames", None, "frames None: expected a number"),
        ("seed", 2**31, "seed 2147483648: expected a number from -1 to"),
        ("seed", True, "seed True: expected a number"),
        ("first_steps", 101, "steps 101: expected a number from 1 to 100"),
        ("video_steps", 0, "steps 0: expected a number from 1 to 100"),
        ("first_guidance", -1, "guidance -1: expected a number from 0 to 20"),
        ("video_guidance", float("inf"), "guidance inf: expected a number from 0 to"),
    ],
)
def test_wishes_out_of_bounds_are_refused_in_words(
    studio: Studio, name: str, value: Any, message: str
):
    with pytest.raises(ValueError, match=message) as error:
        studio.make(WISH._replace(**{name: value}))
    assert len(str(error.value)) < 200
    assert not studio.folder.exists()


def test_a_size_without_videos_is_not_offered(studio: Studio):
    made = replace(MODEL.defaults, sizes=((64, 64, 1), (32, 32, 7)))
    some = replace(studio, model=replace(MODEL, defaults=made))
    assert [size.name for size in some.sizes()] == ["32x32"]
    none = replace(MODEL, defaults=replace(made, sizes=made.sizes[:1]))
    with pytest.raises(ValueError, match="painter names no size of videos"):
        replace(studio, model=none).sizes()


def test_an_uploaded_image_brings_the_guidance_for_images(studio: Studio):
    image = uploaded(studio)
    request = studio.request(WISH._replace(image=str(image)))
    assert request.image == image
    assert request.options == MODEL.defaults.with_image()
    assert request.options.guidance.video == 1.5


def test_no_path_that_a_visitor_names_is_read(studio: Studio, tmp_path: Path):
    uploaded(studio)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40)).save(secret)
    link = studio.uploads / "link.png"
    link.symlink_to(secret)
    paths: list[Any] = ["/etc/passwd", secret, studio.uploads / "../secret.png", link]
    paths += [studio.uploads, "", {"path": str(secret)}, "file:///etc/passwd"]
    for path in paths:
        with pytest.raises(ValueError, match="was not uploaded; upload a file"):
            studio.make(WISH._replace(image=path))


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
def test_files_that_lead_to_others_are_no_images(studio: Studio, text: str):
    path = studio.uploads / "first.png"
    path.write_text(text)
    with pytest.raises(ValueError, match="no image that can be read; use PNG, JPEG"):
        studio.upload(path)


def test_images_of_other_formats_or_too_many_pixels_are_refused(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match="no image that can be read"):
        studio.upload(uploaded(studio, "first.tiff"))
    monkeypatch.setattr(web, "PIXELS", 40 * 40)
    assert studio.upload(uploaded(studio)).name == "first.png"
    with pytest.raises(ValueError, match="41 x 41 pixels; use one of at most"):
        studio.upload(uploaded(studio, side=41))


def test_a_made_video_says_what_it_was_made_with(studio: Studio):
    seen: list[Progress] = []
    made = studio.make(WISH._replace(seed=7), seen.append)
    assert seen[-1] == LAST
    assert made.path.parent == studio.folder
    assert made.path.name.endswith("_a_red_circle_moves_left_7.mp4")
    lines = web.told(made).splitlines()
    assert lines[:3] == [
        "prompt: a red circle moves left",
        "seed: 7",
        "size: 32x32, 7 frames, 8 per second",
    ]
    assert "steps: 10 + 10 for the first frame, 6 + 6 for later ones" in lines
    assert web.told(outputs.read(made.path)).splitlines() == lines


def test_a_closed_studio_stops_at_the_next_step_and_leaves_no_file(studio: Studio):
    def watch(at: Progress) -> None:
        studio.closed.set()

    with pytest.raises(ValueError, match="the page was closed before the video"):
        studio.make(WISH, watch)
    studio.close()
    with pytest.raises(ValueError, match="the page was closed before the video"):
        studio.make(WISH)
    assert not list(studio.folder.glob("*"))


def test_names_of_files_hold_nothing_but_letters_of_the_prompt(studio: Studio):
    made = studio.make(WISH._replace(prompt="../../ä\x00/etc <b>" + "z" * 99, seed=1))
    assert made.path.parent == studio.folder
    assert made.path.name.split("_", 1)[1] == f"etc_b_{'z' * 34}_1.mp4"


def test_the_newest_results_come_first_and_old_ones_are_left_out(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
):
    assert studio.results() == []
    paths = [
        studio.make(WISH._replace(prompt=f"video {i}", seed=i)).path for i in range(3)
    ]
    for path, age in zip(paths, (2, 3, 1), strict=True):
        os.utime(path, (1000 - age, 1000 - age))
    (studio.folder / ".hidden.mp4").write_bytes(paths[0].read_bytes())
    (studio.folder / "other.mp4").write_bytes(b"not a video")
    assert [result.path for result in studio.results()] == [paths[i] for i in (2, 0, 1)]
    monkeypatch.setattr(web, "SHOWN", 2)
    assert [result.path for result in studio.results()] == [paths[2], paths[0]]


def test_the_page_gets_copies_which_follow_the_results(studio: Studio):
    made = studio.make(WISH)
    copy = studio.copy(made)
    assert copy.is_relative_to(studio.uploads) and copy.name == made.path.name
    assert copy.read_bytes() == made.path.read_bytes()
    assert studio.copy(made) == copy
    made.path.write_bytes(b"another video")
    assert studio.copy(made).read_bytes() == b"another video"


def test_stills_are_small_pictures_of_first_frames(studio: Studio):
    made = studio.make(WISH._replace(size="32x64", frames=5, seed=100))
    still = studio.still(made)
    assert still.is_relative_to(studio.uploads)
    with Image.open(still) as image:
        assert image.size == (256, 128)
        assert np.abs(np.asarray(image).astype(int) - 100).max() <= 2
    assert studio.still(made) == still
