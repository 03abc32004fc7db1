# SPDX-License-Identifier: Apache-2.0
"""Files say what they were made from; lists are read, named, resumed and batched.

Sampling is replaced by frames that depend on prompt and seed alone, so that the tests
are about files; tests/launch/test_sample.py samples.
"""

import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.sample import lists, outputs
from launch.sample.lists import Job
from launch.sample.outputs import Request
from pyramid_jax.data import pictures, video_io
from pyramid_jax.pipeline import video
from pyramid_jax.pipeline.video import Size, VideoPipeline

SIZE = Size(32, 32, 3)
CIRCLE = Request("a red circle", SIZE, seed=4)


def drawn(prompt: str, size: Size, seed: int) -> np.ndarray:
    """A plain video whose colour is that of a prompt and a seed."""
    colour = np.array([zlib.crc32(prompt.encode()) % 200, seed, 50], np.uint8)
    return np.broadcast_to(colour, (size.frames, size.height, size.width, 3))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VideoPipeline:
    def text_to_video(self, texts, size, *, negative, seed, options):
        return np.stack([drawn(x, size, seed + i) for i, x in enumerate(texts)])

    def image_to_video(self, image, texts, frames, *, negative, seed, options):
        return np.stack([np.stack([image] * frames)])

    monkeypatch.setattr(VideoPipeline, "text_to_video", text_to_video)
    monkeypatch.setattr(VideoPipeline, "image_to_video", image_to_video)
    return video.load(video.TINY)


# ------------------------------------------------------------------------ single files


@pytest.mark.parametrize("kind", ["mp4", "gif", "npz"])
def test_a_file_says_what_it_was_made_from_inside_and_beside(
    kind: str, model: VideoPipeline, tmp_path: Path
):
    path = tmp_path / "made" / f"a.{kind}"
    (render,) = outputs.make(model, [CIRCLE], [path])
    assert sorted(path.parent.iterdir()) == [path, outputs.beside(path)]
    assert outputs.read(path) == render
    outputs.beside(path).unlink()
    assert outputs.read(path) == render

    recipe = render.recipe
    assert (recipe.prompt, recipe.negative, recipe.seed) == ("a red circle", "", 4)
    assert (recipe.model, recipe.fps, recipe.dtype) == ("tiny", 8.0, "float32")
    assert recipe.options["guidance"]["first"] == model.defaults.guidance.first
    assert set(render.made) == {"date", "device", "pyramid_jax", "jax"}


def test_an_image_is_a_png_with_its_recipe(model: VideoPipeline, tmp_path: Path):
    one = replace(CIRCLE, size=Size(32, 32), scale=3)
    (render,) = outputs.make(model, [one], [tmp_path / "a.png"])
    expected = drawn(one.prompt, Size(96, 96), 4)[0]
    read = pictures.read_picture(render.path, (96, 96))
    np.testing.assert_array_equal(read, expected)
    outputs.beside(render.path).unlink()
    assert outputs.read(render.path) == render


def test_the_frames_are_in_the_file_at_the_rate_of_the_model(
    model: VideoPipeline, tmp_path: Path
):
    paths = tmp_path / "a.mp4", tmp_path / "a.npz"
    for path in paths:
        outputs.make(model, [CIRCLE], [path])
    assert video_io.video_info(paths[0]) == video_io.VideoInfo(32, 32, 3, 8.0)
    with np.load(paths[1]) as arrays:
        np.testing.assert_array_equal(arrays["video"], drawn("a red circle", SIZE, 4))


def test_a_first_frame_covers_the_size_and_is_named_with_its_hash(
    model: VideoPipeline, tmp_path: Path
):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    pictures.write_picture(tmp_path / "first.png", image)
    request = replace(CIRCLE, image=tmp_path / "first.png")
    (render,) = outputs.make(model, [request], [tmp_path / "a.npz"])
    with np.load(render.path) as arrays:
        first = pictures.read_picture(tmp_path / "first.png", (32, 32))
        np.testing.assert_array_equal(arrays["video"][0], first)
    assert str(render.recipe.image).startswith("first.png sha256:")
    pictures.write_picture(tmp_path / "first.png", image[::-1])
    assert outputs.recipe(model, request) != render.recipe


def test_an_interruption_while_writing_leaves_nothing(
    model: VideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(path: Path, *args: Any, **options: Any):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_io, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs.make(model, [CIRCLE], [tmp_path / "a.mp4"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "name", "match"),
    [
        ({"prompt": " "}, "a.mp4", "prompt is empty"),
        ({}, "a.avi", "none of the suffixes"),
        ({}, "a.png", "one frame, but 3"),
        ({"image": Path("missing.png")}, "a.mp4", "missing.png is not a file"),
        ({"image": Path("x"), "size": Size(32, 32)}, "a.png", "ask for more frames"),
    ],
)
def test_impossible_requests_are_refused(
    change: dict, name: str, match: str, model: VideoPipeline, tmp_path: Path
):
    with pytest.raises(ValueError, match=match):
        outputs.make(model, [replace(CIRCLE, **change)], [tmp_path / name])
    assert list(tmp_path.iterdir()) == []


def test_other_files_say_nothing(tmp_path: Path):
    video_io.write_video(tmp_path / "a.mp4", drawn("", SIZE, 0), 8)
    (tmp_path / "b.mp4.json").write_text('{"recipe": {"prompt": 1}, "made": {}}')
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.npz", "e.gif"):
        with pytest.raises(ValueError, match="does not say"):
            outputs.read(tmp_path / name)


# -------------------------------------------------------------------------------- lists


def test_lines_are_prompts_or_objects_and_seeds_count_up(tmp_path: Path):
    lines = [
        "# two shapes",
        "a red circle",
        "",
        json.dumps({"prompt": "a star", "negative": "blur", "seed": 70, "image": "s"}),
        "a ring",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = lists.read_requests(tmp_path / "list.txt", CIRCLE, each=2)
    assert [r.seed for r in found] == [4, 5, 70, 71, 8, 9]
    assert [r.prompt for r in found[::2]] == ["a red circle", "a star", "a ring"]
    assert found[2] == replace(
        CIRCLE, prompt="a star", negative="blur", seed=70, image=tmp_path / "s"
    )


@pytest.mark.parametrize(
    "line",
    ['{"prompt"', '{"negative": "x"}', '{"prompt": 3}', '{"prompt": "x", "a": 1}'],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path):
    (tmp_path / "list.txt").write_text(f"a red circle\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2"):
        lists.read_requests(tmp_path / "list.txt", CIRCLE)


def test_a_list_without_prompts_or_none_at_all_is_refused(tmp_path: Path):
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no prompt"):
        lists.read_requests(tmp_path / "list.txt", CIRCLE)
    with pytest.raises(ValueError, match="is not a file"):
        lists.read_requests(tmp_path / "none.txt", CIRCLE)


def test_names_have_place_prompt_and_seed():
    prompt = "A lion's  Löwe/獅子, " + "very " * 30
    name = lists.file_name(7, replace(CIRCLE, prompt=prompt), "gif")
    assert name == "0007_a_lion_s_löwe_獅子_very_very_very_very_ver_4.gif"
    assert lists.file_name(0, replace(CIRCLE, prompt="?"), "mp4") == "0000_4.mp4"


def jobs(folder: Path, **change: Any) -> list[Job]:
    """Three videos of one prompt."""
    wanted = lists.copies(replace(CIRCLE, **change), 3)
    return lists.jobs(wanted, folder, "mp4")


def test_finished_files_are_left_out_and_what_is_missing_is_made(
    model: VideoPipeline, tmp_path: Path
):
    wanted = jobs(tmp_path)
    outputs.make(model, [wanted[1].request], [wanted[1].path])
    before = wanted[1].path.stat().st_mtime_ns
    left = lists.waiting(model, wanted)
    assert left == [wanted[0], wanted[2]]
    for batch in lists.batches(left, 8):
        outputs.make(model, *zip(*batch, strict=True))
    assert lists.waiting(model, wanted) == []
    assert wanted[1].path.stat().st_mtime_ns == before


def test_files_made_from_something_else_are_refused_and_kept(
    model: VideoPipeline, tmp_path: Path
):
    wanted = jobs(tmp_path)
    outputs.make(model, [wanted[0].request], [wanted[0].path])
    wanted[2].path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="negative '', not 'blur'") as raised:
        lists.waiting(model, jobs(tmp_path, negative="blur"))
    assert "it does not say what from" in str(raised.value)
    assert wanted[2].path.read_bytes() == b"mine"


def test_a_batch_has_equal_sizes_and_seeds_that_count_up(tmp_path: Path):
    requests = [replace(CIRCLE, seed=seed) for seed in (1, 2, 3, 4, 6, 7, 8)]
    requests[5] = replace(requests[5], size=Size(32, 32))
    requests += 2 * [replace(CIRCLE, seed=9, image=tmp_path)]
    listed = [Job(request, tmp_path) for request in requests]
    batches = list(lists.batches(listed, 3))
    assert [[job.request.seed for job in batch] for batch in batches] == [
        [1, 2, 3],
        [4],
        [6],
        [7],
        [8],
        [9],
        [9],
    ]
    assert [job for batch in batches for job in batch] == listed


def test_a_batch_makes_what_its_requests_make_alone(
    model: VideoPipeline, tmp_path: Path
):
    wanted = [job._replace(path=job.path.with_suffix(".npz")) for job in jobs(tmp_path)]
    made = outputs.make(model, *zip(*wanted, strict=True))
    for render, job in zip(made, wanted, strict=True):
        (alone,) = outputs.make(model, [job.request], [tmp_path / "alone.npz"])
        assert asdict(alone.recipe) == asdict(render.recipe)
        with np.load(alone.path) as a, np.load(render.path) as b:
            np.testing.assert_array_equal(a["video"], b["video"])


def test_a_batch_of_strangers_is_refused(model: VideoPipeline, tmp_path: Path):
    others = [CIRCLE, replace(CIRCLE, seed=6)]
    with pytest.raises(ValueError, match="make them one by one"):
        outputs.make(model, others, [tmp_path / "a.mp4", tmp_path / "b.mp4"])
