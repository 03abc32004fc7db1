# SPDX-License-Identifier: Apache-2.0
"""The command makes what its flags say, and ends well whatever happens."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from tqdm import tqdm

from launch import moving_shapes
from launch.sample import __main__, outputs
from pyramid_jax.data import pictures, video_io
from pyramid_jax.pipeline import denoise
from pyramid_jax.pipeline.folder import TINY_LATENT
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.presets import Size
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
    return load(TINY_LATENT)


@pytest.fixture(autouse=True)
def loaded(model: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is loaded once only."""

    def known(folder, mesh, dtype, offload):
        if (str(folder), mesh, dtype) == (str(TINY_LATENT), None, None):
            return model
        return load(folder, mesh, dtype, offload=offload)

    monkeypatch.setattr(__main__, "load", known)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are grey from here on."""

    def grey(self, request, callback_on_step_end):
        size, prompts = request.size, request.prompts
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        frames = np.full(shape, 90, np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", grey)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------ what is made


def test_a_prompt_becomes_a_file_that_says_what_from(tmp_path: Path, capsys):
    arguments = ["--steps=2", "--frames=1", "--seed=3", "--guidance=2", "--scale=2"]
    __main__.sample(given(PROMPT, f"--to={tmp_path}", *arguments))
    name = "0000_a_red_circle_moves_left_3.png"
    assert files(tmp_path) == [name, f"{name}.json"]
    recipe = outputs.read(tmp_path / name).recipe
    assert (recipe.seed, recipe.frames, recipe.model) == (3, 1, "tiny_latent")
    assert recipe.options["first_steps"] == [2, 2]
    assert recipe.options["guidance"]["first"] == 2.0
    assert pictures.read_picture(tmp_path / name, (64, 64)).std() > 1

    shown = capsys.readouterr()
    assert name in shown.out
    assert "1.00/1" in shown.err and "unit 1/1, stage 2/2, step 1/1" in shown.err

    __main__.sample(given(PROMPT, f"--to={tmp_path}", *arguments))
    assert "1 of 1 files are finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_becomes_a_video_that_begins_with_it(tmp_path: Path):
    clip = moving_shapes.render(moving_shapes.parse(CAPTION), np.random.default_rng(0))
    image = moving_shapes.small(clip)[0]
    pictures.write_picture(tmp_path / "first.png", image)
    arguments = [f"--image={tmp_path / 'first.png'}", "--seconds=0.3", "--kind=npz"]
    arguments += ["--steps=2", "--video_steps=2", f"--to={tmp_path / 'made'}"]
    __main__.sample(given(PROMPT, *arguments))
    (path,) = (tmp_path / "made").glob("*.npz")
    with np.load(path) as arrays:
        video = arrays["video"]
    assert video.shape == (3, 32, 32, 3)
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
    (job,) = __main__.planned(model, none)
    assert job.request.options == model.defaults
    assert job.request.size == Size(32, 32, 7)

    some = ["--video_steps=3,4", "--decay=0.5", "--floor=1", "--scans=2", "--last_step"]
    (job,) = __main__.planned(model, given(PROMPT, *some))
    guidance = replace(model.defaults.guidance, decay=0.5, floor=1.0)
    assert job.request.options == replace(
        model.defaults, video_steps=(3, 4), guidance=guidance, scans=2, last_step=True
    )


def test_a_given_image_has_the_guidance_for_images(
    model: VideoPipeline, tmp_path: Path
):
    other = replace(model, defaults=replace(model.defaults, image_guidance=3.5))
    image = tmp_path / "a.png"
    pictures.write_picture(image, np.zeros((32, 32, 3), np.uint8))
    (job,) = __main__.planned(other, given(PROMPT, f"--image={image}"))
    assert job.request.options.guidance.video == 3.5
    (job,) = __main__.planned(
        other, given(PROMPT, f"--image={image}", "--video_guidance=6")
    )
    assert job.request.options.guidance.video == 6.0


def test_the_model_tells_what_it_was_made_for(capsys):
    __main__.sample(given("--show"))
    shown = capsys.readouterr().out
    assert "32x32 up to 7 frames (0.88 s), at 8 fps" in shown
    assert "guidance: 2 for the first frame, then 2" in shown


def test_a_bar_counts_videos_by_the_finished_work(capsys):
    with tqdm(total=6, initial=2, bar_format=__main__.BAR) as bar:
        step = __main__.progress_bar(bar, 4)
        for done in (0.25, 0.5):
            step(denoise.Progress(1, 4, 0, 2, 2, 6, done, jnp.zeros(1)))
        assert bar.n == pytest.approx(4)
    assert "unit 2/4, stage 1/2, step 3/6" in capsys.readouterr().err


# -------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt"),
        ([PROMPT, "--prompts=a.txt"], "give either --prompt"),
        ([PROMPT, "--frames=3", "--seconds=1"], "not both"),
        ([PROMPT, "--size=64x64"], "was made for 32x32 up to 7 frames"),
        ([PROMPT, "--frames=4"], "use 3 or 5"),
        ([PROMPT, "--steps=1,2,3"], "one entry for each of the 2 stages"),
        ([PROMPT, "--steps=1"], "1 steps per stage: give 1 or more (2 without the"),
        ([PROMPT, "--steps=ten"], "steps ten are no numbers"),
        ([PROMPT, "--image=missing.jpg"], "missing.jpg is not a file"),
        ([PROMPT, "--kind=png"], "a png file holds one frame"),
        ([PROMPT, "--mesh=data=2,rows=4"], "'rows=4' is not AXIS=SIZE"),
        ([PROMPT, "--mesh=data=3"], "set one size to -1"),
        (["--model=missing"], "has no config.json"),
    ],
)
def test_wrong_flags_end_with_one_sentence_before_anything_is_made(
    arguments: list[str], message: str, tmp_path: Path
):
    with pytest.raises(SystemExit) as ended:
        __main__.sample(given(*arguments, f"--to={tmp_path / 'made'}"))
    assert message in str(ended.value.code)
    assert not (tmp_path / "made").exists()


def test_other_files_are_not_overwritten(tmp_path: Path, quick):
    __main__.sample(given(PROMPT, f"--to={tmp_path}"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="write to another folder"):
        __main__.sample(given(PROMPT, f"--to={tmp_path}", "--guidance=9"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_was_finished_and_is_continued(
    sent: int, tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
):
    make, before = outputs.make, signal.getsignal(signal.SIGTERM)

    def interrupted(model, jobs, callback_on_step_end):
        if jobs[0].request.seed == 2:
            os.kill(os.getpid(), sent)
        return make(model, jobs, callback_on_step_end)

    monkeypatch.setattr(outputs, "make", interrupted)
    monkeypatch.setattr(flags, "FLAGS", given(PROMPT, f"--to={tmp_path}", "--each=4"))
    try:
        with pytest.raises(SystemExit) as ended:
            __main__.main(["sample"])
    finally:
        signal.signal(signal.SIGTERM, before)
        logging.getLogger("pyramid_jax.kernels").setLevel(logging.NOTSET)
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
    with pytest.raises(SystemExit, match="no longer finite"):
        __main__.sample(given(PROMPT, f"--to={tmp_path}"))


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
        assert video_io.video_info(path).frames == 7
        assert json.loads(outputs.beside(path).read_text())["recipe"]["frames"] == 7
