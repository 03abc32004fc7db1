# SPDX-License-Identifier: Apache-2.0
"""The command makes what its flags say, and ends well whatever happens."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image
from tqdm import tqdm

from launch import start
from launch.pairs.dataset import pair
from launch.sample import __main__, choices, outputs, progress
from pyramid_jax.data import pictures, video_io
from pyramid_jax.pipeline import denoise
from pyramid_jax.pipeline.folder import PAIRS
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline, load

ROOT = Path(__main__.__file__).resolve().parents[1]
CAPTION = "a red circle moves left"
PROMPT = f"--prompt={CAPTION}"


def given(*arguments: str) -> flags.FlagValues:
    """The flags of a command line."""
    values = flags.FlagValues()
    __main__.define(values)
    values(["sample", *arguments])
    return values


@pytest.fixture(scope="module")
def model() -> VideoPipeline:
    return load(PAIRS)


@pytest.fixture(autouse=True)
def loaded(model: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is loaded once only."""

    def known(folder, mesh, dtype, **how):
        if (str(folder), mesh, dtype) == (str(PAIRS), None, None):
            return model
        return load(folder, mesh, dtype, **how)

    monkeypatch.setattr(choices, "load", known)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are grey from here on."""

    def grey(self, request, callback_on_step_end):
        size, prompts = request.size, request.prompts
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        frames = np.full(shape, 90, np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", grey)


def planned(model: VideoPipeline, values: flags.FlagValues) -> list[outputs.Job]:
    """The files that flags ask of a model."""
    return __main__.planned(model, values, __main__.given_lines(values))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------ what is made


def test_a_prompt_becomes_a_file_that_says_what_from(tmp_path: Path, capsys):
    arguments = ["--steps=2", "--frames=1", "--seed=3", "--guidance=2", "--scale=2"]
    __main__.sample(given(PROMPT, f"--to={tmp_path}", *arguments))
    name = "0000_a_red_circle_moves_left_3.png"
    assert files(tmp_path) == [name, f"{name}.json"]
    recipe = outputs.read(tmp_path / name).recipe
    assert (recipe.seed, recipe.frames, recipe.model) == (3, 1, "pairs")
    assert recipe.options["first_steps"] == [2, 2, 2]
    assert recipe.options["guidance"]["first"] == 2.0
    assert pictures.read_picture(tmp_path / name, (64, 64)).std() > 1

    shown = capsys.readouterr()
    assert name in shown.out
    assert "1.00/1" in shown.err and "unit 1/1, stage 3/3, step 1/1" in shown.err

    __main__.sample(given(PROMPT, f"--to={tmp_path}", *arguments))
    assert "1 of 1 files are finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_becomes_a_video_that_begins_with_it(tmp_path: Path):
    image = pair(5, split="held out", kind="video").pixels[0]
    pictures.write_picture(tmp_path / "first.png", image)
    arguments = [f"--image={tmp_path / 'first.png'}", "--seconds=0.6", "--kind=npz"]
    arguments += ["--steps=2", "--video_steps=2", f"--to={tmp_path / 'made'}"]
    __main__.sample(given(PROMPT, *arguments))
    (path,) = (tmp_path / "made").glob("*.npz")
    with np.load(path) as arrays:
        video = arrays["video"]
    assert video.shape == (5, 64, 64, 3)
    lost = np.abs(video[0].astype(int) - image).mean()  # by the small VAE
    assert lost < 10 < np.abs(video[0].astype(int) - image[:, ::-1]).mean()


def test_a_list_is_made_in_batches_with_copies(tmp_path: Path, quick):
    (tmp_path / "list.txt").write_text('a star\n{"prompt": "a ring", "seed": 9}\n')
    arguments = f"--prompts={tmp_path / 'list.txt'}", f"--to={tmp_path / 'made'}"
    __main__.sample(given(*arguments, "--each=2", "--batch=4", "--kind=gif"))
    found = sorted((tmp_path / "made").glob("*.gif"))
    assert [path.name for path in found] == [
        "0000_a_star_0.gif",
        "0001_a_star_1.gif",
        "0002_a_ring_9.gif",
        "0003_a_ring_10.gif",
    ]
    assert outputs.read(found[3]).recipe.seed == 10


def test_flags_change_what_the_model_recommends_and_nothing_else(
    model: VideoPipeline, tmp_path: Path
):
    none = given(PROMPT)
    (job,) = planned(model, none)
    assert job.request.options == model.defaults
    assert job.request.size == Size(64, 64, 33)

    some = [
        "--video_steps=3,4,5",
        "--decay=0.5",
        "--floor=1",
        "--scans=2",
        "--last_step",
    ]
    (job,) = planned(model, given(PROMPT, *some))
    guidance = replace(model.defaults.guidance, decay=0.5, floor=1.0)
    assert job.request.options == replace(
        model.defaults,
        video_steps=(3, 4, 5),
        guidance=guidance,
        scans=2,
        last_step=True,
    )


def test_a_given_image_has_the_guidance_for_images(
    model: VideoPipeline, tmp_path: Path
):
    other = replace(model, defaults=replace(model.defaults, image_guidance=3.5))
    image = tmp_path / "a.png"
    pictures.write_picture(image, np.zeros((32, 32, 3), np.uint8))
    (job,) = planned(other, given(PROMPT, f"--image={image}"))
    assert job.request.options.guidance.video == 3.5
    (job,) = planned(other, given(PROMPT, f"--image={image}", "--video_guidance=6"))
    assert job.request.options.guidance.video == 6.0


def test_a_video_in_a_file_is_continued(model: VideoPipeline, tmp_path: Path):
    """Its newest whole units; the whole may be longer than the model was made for."""
    clip, drawn = tmp_path / "clip.mp4", np.full((6, 64, 64, 3), 90, np.uint8)
    video_io.write_video(clip, drawn, model.defaults.fps)
    (job,) = planned(model, given(PROMPT, f"--extend={clip}"))
    request = job.request
    assert request.video is not None and request.video.shape == (1, 5, 64, 64, 3)
    assert np.abs(request.video.astype(int) - 90).max() <= 3
    assert request.size.frames == 5 + 33 - 1 and request.options.window == 8
    assert outputs.recipe(model, job).image == outputs.fingerprint(clip)
    assert outputs.recipe(model, job).options["window"] == 8
    (job,) = planned(model, given(PROMPT, f"--extend={clip}", "--frames=9"))
    assert job.request.options == model.defaults
    with pytest.raises(ValueError, match="5 frames were asked for, but the video"):
        planned(model, given(PROMPT, f"--extend={clip}", "--frames=5"))
    (tmp_path / "list.txt").write_text('{"prompt": "a ring", "video": "clip.mp4"}')
    listed = given(f"--prompts={tmp_path / 'list.txt'}")
    assert __main__.given_lines(listed)[0].given == clip


def test_the_model_tells_what_it_was_made_for(capsys):
    __main__.sample(given("--show"))
    shown = capsys.readouterr().out
    assert "64x64 up to 33 frames (4.1 s), 64x96 up to 33 frames" in shown
    assert "guidance: 4.5 for the first frame, then 2" in shown


def test_a_bar_counts_videos_and_tells_time_left_once_all_is_compiled():
    with tqdm(total=6, initial=2, bar_format=progress.COMPILING) as bar:
        step = progress.progress_bar(bar, 4)
        for done in (0.25, 0.5):
            step(denoise.Progress(1, 4, 0, 2, 2, 6, done, jnp.zeros(1)))
        assert bar.n == pytest.approx(4) and "compiling" in str(bar)
        assert "unit 2/4, stage 1/2, step 3/6" in str(bar)
        step(denoise.Progress(1, 4, 1, 2, 0, 6, 0.6, jnp.zeros(1)))
        assert "compiling" not in str(bar)


# -------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt"),
        ([PROMPT, "--prompts=a.txt"], "give either --prompt"),
        ([PROMPT, "--frames=3", "--seconds=1"], "not both"),
        ([PROMPT, "--size=32x32"], "was made for 64x64 up to 33 frames"),
        ([PROMPT, "--frames=4"], "use 1 or 5"),
        ([PROMPT, "--steps=2,2"], "one entry for each of the 3 stages"),
        ([PROMPT, f"--steps={10**20}"], "give 1 or more"),
        ([PROMPT, "--steps=1"], "1 steps per stage: give 1 or more (2 without the"),
        ([PROMPT, "--steps=ten"], "steps ten are no numbers"),
        ([PROMPT, "--image=missing.jpg"], "missing.jpg cannot be read as an image"),
        ([PROMPT, "--extend=missing.mp4"], "missing.mp4"),
        (
            [PROMPT, "--extend=a.mp4", "--image=a.png"],
            "an image and a video were given",
        ),
        ([PROMPT, "--kind=png"], "a png file holds one frame"),
        ([PROMPT, "--mesh=data=2,rows=4"], "'rows=4' is not AXIS=SIZE"),
        ([PROMPT, "--mesh=data=3"], "set one size to -1"),
        ([PROMPT, "--model=missing"], "has no config.json"),
    ],
)
def test_wrong_flags_end_with_one_sentence_before_anything_is_made(
    arguments: list[str], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        __main__.sample(given(*arguments, f"--to={tmp_path / 'made'}"))
    assert not (tmp_path / "made").exists()


def unreadable(folder: Path) -> dict[str, str]:
    """Flags that no model can do anything about, and what is said about each."""
    (folder / "notes.jpg").write_text("no picture")
    Image.new("L", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:90])
    (folder / "latin.txt").write_bytes("Löwe".encode("latin-1"))
    (folder / "deep.txt").write_text('{"a":' * 100_000)
    (folder / "seeds.txt").write_text('{"prompt": "a", "seed": 2147483648}')
    return {
        f"--image={folder}/notes.jpg": "notes.jpg cannot be read",
        f"--image={folder}/bomb.png": "bomb.png",
        f"--image={folder}/cut.png": "cut.png cannot be read",
        "--seed=18446744073709551615": "must be a whole number of 0 to 2147483647",
        "--seed=2147483648": "must be a whole number",
        f"--prompts={folder}/latin.txt": "latin.txt can't be read as text in UTF-8",
        f"--prompts={folder}/seeds.txt": "seed 2147483648 must be",
        "--prompt=L\udcf6we": "is no text in UTF-8",
        "--guidance=nan": "guidance first=nan must be 0 to 100",
        "--guidance=1e9": "guidance first=1000000000.0 must be 0 to 100",
        "--decay=nan": "guidance decay=nan must be 0 to 100",
        "--seconds=inf": "inf seconds: expected a positive number up to 86400",
        "--seconds=1e308": "1e+308 seconds: expected a positive number",
        f"--prompts={folder}/deep.txt": "deep.txt, line 1: maximum recursion depth",
        f"--prompts={folder}/none.txt": "(No such file or directory); correct",
        "--to=/proc/nope": "nothing can be written to the folder /proc/nope",
        "--to=/dev/null/a": "nothing can be written to the folder /dev/null/a",
    }


def test_what_no_model_can_do_is_refused_before_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(choices, "load", too_late)
    for flag, message in unreadable(tmp_path).items():
        own = [] if flag.startswith(("--prompt=", "--prompts=")) else [PROMPT]
        to = [] if flag.startswith("--to") else [f"--to={tmp_path / 'made'}"]
        with pytest.raises(ValueError) as refused:
            __main__.sample(given(*own, *to, flag))
        assert message in str(refused.value), flag
    assert not (tmp_path / "made").exists()


def test_other_files_are_not_overwritten(tmp_path: Path, quick):
    __main__.sample(given(PROMPT, f"--to={tmp_path}"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    differs = r"\(options\.guidance\.first 4\.5, not 9\.0\)\nwrite to another folder"
    with pytest.raises(ValueError, match=differs):
        __main__.sample(given(PROMPT, f"--to={tmp_path}", "--guidance=9"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_was_finished_and_is_continued(
    sent: int, tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
):
    make = outputs.make
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def interrupted(model, jobs, callback_on_step_end):
        if jobs[0].request.seed == 2:
            os.kill(os.getpid(), sent)
        return make(model, jobs, callback_on_step_end)

    monkeypatch.setattr(outputs, "make", interrupted)
    try:
        with pytest.raises(SystemExit) as ended, start.one_line_errors():
            __main__.sample(given(PROMPT, f"--to={tmp_path}", "--each=4"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert len(files(tmp_path)) == 4 and not any(tmp_path.glob(".*"))

    monkeypatch.setattr(outputs, "make", make)
    __main__.sample(given(PROMPT, f"--to={tmp_path}", "--each=4"))
    assert len(list(tmp_path.glob("*.mp4"))) == 4


def test_numbers_that_are_not_finite_end_the_run_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*args, **options):
        raise FloatingPointError("unit 1/4: the video is no longer finite")

    monkeypatch.setattr(VideoPipeline, "run", broken)
    ends = pytest.raises(SystemExit, match="no longer finite")
    with ends, start.one_line_errors():
        __main__.sample(given(PROMPT, f"--to={tmp_path}"))


def test_a_full_disk_is_one_line_and_whole_files_stay(
    tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
):
    write = video_io.write_video

    def full(path: Path, *arguments: object, **options: object) -> None:
        if "_2." in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *arguments, **options)

    monkeypatch.setattr(video_io, "write_video", full)
    ends = pytest.raises(SystemExit, match="No space left on device; make room")
    with ends, start.one_line_errors():
        __main__.sample(given(PROMPT, f"--to={tmp_path}", "--each=4"))
    assert len(list(tmp_path.glob("*.mp4"))) == 2 and not any(tmp_path.glob(".*"))


def test_a_list_that_makes_many_batches_says_so(tmp_path: Path, quick, capsys):
    (tmp_path / "list.txt").write_text('a\n{"prompt": "b", "seed": 70}\nc\n')
    arguments = [f"--prompts={tmp_path}/list.txt", f"--to={tmp_path}", "--batch=3"]
    __main__.sample(given(*arguments))
    assert "3 videos are made in 3 batches" in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_runs_from_the_shell_and_survives_sigterm(tmp_path: Path):
    command = [sys.executable, "-m", "launch.sample", PROMPT, f"--to={tmp_path}"]
    command += ["--steps=2", "--video_steps=2", "--each=1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().strip().endswith("_0.mp4")
        run.terminate()
        assert run.wait() == 130
    made = sorted(tmp_path.glob("*.mp4"))
    assert made and not list(tmp_path.glob(".*"))
    for path in made:
        assert video_io.video_info(path).frames == 33
        assert json.loads(outputs.beside(path).read_text())["recipe"]["frames"] == 33
