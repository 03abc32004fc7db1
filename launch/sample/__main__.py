# SPDX-License-Identifier: Apache-2.0
r"""Makes videos and images from prompts.

    pyramid-jax sample --prompt="a red circle moves left"
    pyramid-jax sample --model=MODEL --prompt="a lighthouse at dusk" --seconds=5
    pyramid-jax sample --model=MODEL --prompt="waves" --image=first.jpg --each=3
    pyramid-jax sample --model=MODEL --prompt="it begins to rain" --extend=clip.mp4
    pyramid-jax sample --model=MODEL --prompts=list.txt --batch=4 --mesh=data=4
    pyramid-jax sample --model=MODEL --show

What is not given is what the model was made for (--show tells). Each file says what it
was made from, inside and in a JSON file beside it. Lines of a list are prompts, or JSON
objects with "prompt", "negative", "seed", "image" and "video". Seeds count up over a
run. A run that was interrupted is continued by the same command, which skips finished
files.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from launch import start
from launch.sample import choices, outputs
from launch.sample.choices import check_choices, define_choices, requested
from launch.sample.lists import Line, file_name, read_lines, waiting
from launch.sample.outputs import Job
from launch.sample.progress import run
from pyramid_jax.data.pictures import read_picture
from pyramid_jax.data.video_io import video_info
from pyramid_jax.pipeline.request import check_seed, check_text
from pyramid_jax.pipeline.video import VideoPipeline

UNREAD = (8, 8)  # pixels that an image is read in to see whether it can be


def sample(values: Any) -> None:
    """Does what the flags say.

    Raises:
        ValueError: what can't be done, before anything is made; most of it before the
            model is loaded.
    """
    lines = [] if values.show else given_lines(values)
    pipeline = choices.chosen_model(values)
    if values.show:
        print(description(pipeline))
        return
    jobs = planned(pipeline, values, lines)
    left = waiting(pipeline, jobs)
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} files are finished already")
    try:
        run(pipeline, left, values.batch)
    except KeyboardInterrupt:
        print("the same command makes what is not finished")
        raise


def given_lines(values: Any) -> list[Line]:
    """What the flags ask for, as far as it can be checked without a model.

    Raises:
        ValueError: flags that exclude each other, prompts, seeds or images that can't
            be read, or a folder that can't be written to.
    """
    if (values.prompt is None) == (values.prompts is None):
        raise ValueError("give either --prompt=TEXT or --prompts=FILE; see --help")
    lines = (
        [Line(values.prompt)] if values.prompts is None else read_lines(values.prompts)
    )
    image, video = (Path(x) if x else None for x in (values.image, values.extend))
    lines = [
        line if line.given else line._replace(image=image, video=video)
        for line in lines
    ]
    if any(line.image and line.video for line in lines):
        raise ValueError("an image and a video were given; a video begins with one")
    for number, line in enumerate(lines):
        check_text(line.prompt)
        check_text(line.negative or values.negative or "")
        counted = values.seed + number * values.each
        check_seed(counted if line.seed is None else line.seed, values.each)
    for image in {line.image for line in lines if line.image is not None}:
        read_picture(image, UNREAD)
    for video in {line.video for line in lines if line.video is not None}:
        video_info(video)
    check_choices(values)
    start.check_writable(values.to)
    return lines


def planned(pipeline: VideoPipeline, values: Any, lines: Sequence[Line]) -> list[Job]:
    """The files to make.

    Raises:
        ValueError: what the model can't make.
    """
    jobs: list[Job] = []
    for line in lines:
        seed = values.seed + len(jobs) if line.seed is None else line.seed
        request = requested(pipeline, values, line, seed)
        kind = values.kind or ("png" if request.size.frames == 1 else "mp4")
        for copy in range(values.each):
            name = file_name(len(jobs), line.prompt, seed + copy, kind)
            one = replace(request, seed=seed + copy)
            jobs.append(Job(one, Path(values.to) / name, line.given, values.scale))
    return jobs


def description(pipeline: VideoPipeline) -> str:
    """What a model was made for, and what is recommended for it."""
    defaults, guidance = pipeline.defaults, pipeline.defaults.guidance
    later = defaults.with_image().guidance.video
    sizes = ", ".join(map(str, pipeline.sizes)) or "not known"
    return (
        f"model: {pipeline.name}\n"
        f"sizes: {sizes}, at {defaults.fps:g} fps\n"
        f"steps: {defaults.first_steps} for the first frame, then "
        f"{defaults.video_steps}\n"
        f"guidance: {guidance.first:g} for the first frame, then {guidance.video:g}, "
        f"or {later:g} if the first frame is given"
    )


def define(into: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    text = partial(flags.DEFINE_string, flag_values=into)
    whole = partial(flags.DEFINE_integer, flag_values=into)
    switch = partial(flags.DEFINE_bool, flag_values=into)
    choice = partial(flags.DEFINE_enum, flag_values=into)
    text("prompt", None, "What the video shows.")
    text("prompts", None, "File with a prompt, or a JSON object, on every line.")
    text("negative", None, "What it does not show; none: what the model recommends.")
    text("image", None, "File of the first frame, scaled to cover, and cropped.")
    text("extend", None, "File of a video to continue; lengths are those of the whole.")
    whole("seed", 0, "Seed of the first video; the others count up.", lower_bound=0)
    whole("each", 1, "Videos of every prompt.", lower_bound=1, upper_bound=10_000)
    define_choices(into)
    switch("show", False, "Print what the model was made for, and end.")
    whole("batch", 1, "Videos sampled together.", lower_bound=1)
    text("to", "runs/sample", "Folder to write to.")
    choice("kind", None, outputs.KINDS, "Kind of files; none: mp4, or png for images.")
    scale_help = "Show every pixel as a block of so many."
    whole("scale", 1, scale_help, lower_bound=1, upper_bound=64)


HEADINGS = {"prompt": "what to make", **choices.HEADINGS, "to": "files"}

if __name__ == "__main__":
    start.run(sample, define, HEADINGS)
