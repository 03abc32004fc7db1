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
from launch.sample.lists import Line
from launch.sample.outputs import Job
from pyramid_jax.data import pictures, video_io
from pyramid_jax.pipeline.folder import TINY
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.request import VideoRequest
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline, load

SIZE = Size(32, 32, 3)
DEFAULTS = load(TINY).defaults
CIRCLE = VideoRequest(("a red circle",), ("",), 4, SIZE, DEFAULTS)


def drawn(prompt: str, size: Size, seed: int) -> np.ndarray:
    """A plain video whose colour is that of a prompt and a seed."""
    colour = np.array([zlib.crc32(prompt.encode()) % 200, seed, 50], np.uint8)
    return np.broadcast_to(colour, (size.frames, size.height, size.width, 3))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VideoPipeline:
    def run(self, request: VideoRequest, callback_on_step_end: Any) -> VideoOutput:
        prompts, seed = request.prompts, request.seed
        if request.image is None:
            numbered = enumerate(prompts)
            frames = [drawn(x, request.size, seed + i) for i, x in numbered]
        else:
            frames = [np.stack([request.image] * request.size.frames)]
        return VideoOutput(np.stack(frames), prompts, seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", run)
    return load(TINY)


def make(model: VideoPipeline, path: Path, request: VideoRequest = CIRCLE, **job):
    """The finished file of one job."""
    (render,) = outputs.make(model, [Job(request, path, **job)])
    return render


# ------------------------------------------------------------------------ single files


@pytest.mark.parametrize("kind", ["mp4", "gif", "npz"])
def test_a_file_says_what_it_was_made_from_inside_and_beside(
    kind: str, model: VideoPipeline, tmp_path: Path
):
    path = tmp_path / "made" / f"a.{kind}"
    render = make(model, path)
    assert sorted(path.parent.iterdir()) == [path, outputs.beside(path)]
    assert outputs.read(path) == render
    outputs.beside(path).unlink()
    assert outputs.read(path) == render

    recipe = render.recipe
    assert (recipe.prompt, recipe.negative, recipe.seed) == ("a red circle", "", 4)
    assert (recipe.model, recipe.fps, recipe.dtype) == ("tiny", 8.0, "float32")
    assert recipe.options["guidance"]["first"] == model.defaults.guidance.first
    assert set(render.made) == {"date", "device", "pyramid_jax", "jax"}


def test_records_and_what_is_not_whole_may_stand_elsewhere(
    model: VideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, records = tmp_path / "clips" / "a.mp4", tmp_path / "records"
    write, seen = outputs._write, []

    def watched(part: Path, *arguments) -> None:
        write(part, *arguments)
        seen.append((part.parent, list(path.parent.iterdir())))

    monkeypatch.setattr(outputs, "_write", watched)
    render = make(model, path, records=records)
    assert seen == [(records, [])]
    assert list(path.parent.iterdir()) == [path]
    assert list(records.iterdir()) == [records / "a.mp4.json"]
    path.write_bytes(b"")
    assert outputs.read(path, records) == render


def test_an_image_is_a_png_with_its_recipe(model: VideoPipeline, tmp_path: Path):
    one = replace(CIRCLE, size=Size(32, 32))
    render = make(model, tmp_path / "a.png", one, scale=3)
    expected = drawn(one.prompts[0], Size(96, 96), 4)[0]
    read = pictures.read_picture(render.path, (96, 96))
    np.testing.assert_array_equal(read, expected)
    outputs.beside(render.path).unlink()
    assert outputs.read(render.path) == render


def test_the_frames_are_in_the_file_at_the_rate_of_the_model(
    model: VideoPipeline, tmp_path: Path
):
    paths = tmp_path / "a.mp4", tmp_path / "a.npz"
    for path in paths:
        make(model, path)
    assert video_io.video_info(paths[0]) == video_io.VideoInfo(32, 32, 3, 8.0)
    with np.load(paths[1]) as arrays:
        np.testing.assert_array_equal(arrays["video"], drawn("a red circle", SIZE, 4))


def test_a_first_frame_covers_the_size_and_is_named_with_its_hash(
    model: VideoPipeline, tmp_path: Path
):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    pictures.write_picture(tmp_path / "first.png", image)
    first = pictures.read_picture(tmp_path / "first.png", (32, 32))
    job = Job(replace(CIRCLE, image=first), tmp_path / "a.npz", tmp_path / "first.png")
    (render,) = outputs.make(model, [job])
    with np.load(render.path) as arrays:
        np.testing.assert_array_equal(arrays["video"][0], first)
    assert str(render.recipe.image).startswith("first.png sha256:")
    pictures.write_picture(tmp_path / "first.png", image[::-1])
    assert outputs.recipe(model, job) != render.recipe


def test_an_interruption_while_writing_leaves_nothing(
    model: VideoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(path: Path, *args: Any, **options: Any):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(video_io, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "name", "match"),
    [
        ({"prompts": (" ",)}, "a.mp4", "prompt is empty"),
        ({}, "a.avi", "none of the suffixes"),
        ({}, "a.png", "one frame, but 3"),
        ({"image": Path("missing.png")}, "a.mp4", "missing.png is not a file"),
        ({"image": Path("x"), "size": Size(32, 32)}, "a.png", "ask for more frames"),
    ],
)
def test_impossible_requests_are_refused(
    change: dict, name: str, match: str, model: VideoPipeline, tmp_path: Path
):
    image = change.pop("image", None)
    request = replace(CIRCLE, **change)
    with pytest.raises(ValueError, match=match):
        make(model, tmp_path / name, request, image=image)
    assert list(tmp_path.iterdir()) == []


def test_other_files_say_nothing(tmp_path: Path):
    video_io.write_video(tmp_path / "a.mp4", drawn("", SIZE, 0), 8)
    (tmp_path / "b.mp4.json").write_text('{"recipe": {"prompt": 1}, "made": {}}')
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.npz", "e.gif"):
        with pytest.raises(ValueError, match="does not say"):
            outputs.read(tmp_path / name)


# -------------------------------------------------------------------------------- lists


def test_lines_are_prompts_or_objects(tmp_path: Path):
    lines = [
        "# two shapes",
        "a red circle",
        "",
        json.dumps({"prompt": "a star", "negative": "blur", "seed": 70, "image": "s"}),
        "a ring",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert lists.read_lines(tmp_path / "list.txt") == [
        Line("a red circle"),
        Line("a star", "blur", 70, tmp_path / "s"),
        Line("a ring"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_any_editor_are_read(encoding: str, end: str, tmp_path: Path):
    first = json.dumps({"prompt": "a star", "seed": 70})
    text = end.join([first, "# a comment", "a\u2028b\fc", "Löwe"])
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    lines = [Line("a star", seed=70), Line("a\u2028b\fc"), Line("Löwe")]
    assert lists.read_lines(tmp_path / "list.txt") == lines


def test_a_comment_behind_a_byte_order_mark_says_nothing(tmp_path: Path):
    (tmp_path / "list.txt").write_text("# two\na ring", encoding="utf-8-sig")
    assert lists.read_lines(tmp_path / "list.txt") == [Line("a ring")]


def test_a_list_in_latin_1_is_refused_with_the_cure(tmp_path: Path):
    (tmp_path / "list.txt").write_bytes("Löwe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt can't be .* iconv -f LATIN1"):
        lists.read_lines(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "line",
    ['{"prompt"', '{"negative": "x"}', '{"prompt": 3}', '{"prompt": "x", "a": 1}'],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path):
    (tmp_path / "list.txt").write_text(f"a red circle\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2"):
        lists.read_lines(tmp_path / "list.txt")


def test_a_list_without_prompts_or_none_at_all_is_refused(tmp_path: Path):
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no prompt"):
        lists.read_lines(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"none\.txt can't be read"):
        lists.read_lines(tmp_path / "none.txt")


def test_names_have_place_prompt_and_seed():
    prompt = "A lion's  Löwe/獅子, " + "very " * 30
    name = lists.file_name(7, prompt, 4, "gif")
    assert name == "0007_a_lion_s_löwe_獅子_very_very_very_very_ver_4.gif"
    assert lists.file_name(0, "?", 4, "mp4") == "0000_4.mp4"


def jobs(folder: Path, **change: Any) -> list[Job]:
    """Three videos of one prompt."""
    return [
        Job(replace(CIRCLE, seed=seed, **change), folder / f"{seed}.mp4")
        for seed in (4, 5, 6)
    ]


def test_finished_files_are_left_out_and_what_is_missing_is_made(
    model: VideoPipeline, tmp_path: Path
):
    wanted = jobs(tmp_path)
    outputs.make(model, [wanted[1]])
    before = wanted[1].path.stat().st_mtime_ns
    left = lists.waiting(model, wanted)
    assert left == [wanted[0], wanted[2]]
    for batch in lists.batches(left, 8):
        outputs.make(model, batch)
    assert lists.waiting(model, wanted) == []
    assert wanted[1].path.stat().st_mtime_ns == before


def test_files_made_from_something_else_are_refused_and_kept(
    model: VideoPipeline, tmp_path: Path
):
    wanted = jobs(tmp_path)
    outputs.make(model, [wanted[0]])
    wanted[2].path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="negative '', not 'blur'") as raised:
        lists.waiting(model, jobs(tmp_path, negative_prompts=("blur",)))
    assert "it does not say what from" in str(raised.value)
    assert wanted[2].path.read_bytes() == b"mine"


def test_a_batch_has_equal_sizes_and_seeds_that_count_up(tmp_path: Path):
    requests = [replace(CIRCLE, seed=seed) for seed in (1, 2, 3, 4, 6, 7, 8)]
    requests[5] = replace(requests[5], size=Size(32, 32))
    listed = [Job(request, tmp_path) for request in requests]
    listed += 2 * [Job(replace(CIRCLE, seed=9), tmp_path, image=tmp_path)]
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
    made = outputs.make(model, wanted)
    for render, job in zip(made, wanted, strict=True):
        alone = make(model, tmp_path / "alone.npz", job.request)
        assert asdict(alone.recipe) == asdict(render.recipe)
        with np.load(alone.path) as a, np.load(render.path) as b:
            np.testing.assert_array_equal(a["video"], b["video"])


def test_a_batch_of_strangers_is_refused(model: VideoPipeline, tmp_path: Path):
    requests = [CIRCLE, replace(CIRCLE, seed=6)]
    others = [Job(x, tmp_path / f"{x.seed}.mp4") for x in requests]
    with pytest.raises(ValueError, match="make them one by one"):
        outputs.make(model, others)
