# SPDX-License-Identifier: Apache-2.0
r"""Makes videos and images from prompts.

    pyramid-jax sample --prompt="a red circle moves left"
    pyramid-jax sample --model=MODEL --prompt="a lighthouse at dusk" --seconds=5
    pyramid-jax sample --model=MODEL --prompt="waves" --image=first.jpg --each=3
    pyramid-jax sample --model=MODEL --prompts=list.txt --batch=4 --mesh=data=4
    pyramid-jax sample --model=MODEL --show

What is not given is what the model was made for (--show tells). Each file says what it
was made from, inside and in a JSON file beside it. Lines of a list are prompts, or JSON
objects with "prompt", "negative", "seed" and "image". Seeds count up over a run. A run
that was interrupted is continued by the same command, which skips finished files.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from launch import start
from launch.sample import outputs
from launch.sample.lists import Line, batches, file_name, read_lines, waiting
from launch.sample.outputs import Job
from launch.sizes import check_preset, height_width
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.denoise import Progress, StepCallback
from pyramid_jax.pipeline.folder import TINY_LATENT
from pyramid_jax.pipeline.request import not_none
from pyramid_jax.pipeline.video import VideoPipeline, load

BAR = "{n:.2f}/{total} |{bar:20}| {elapsed}<{remaining}{postfix}"
INTERRUPTED = 130  # the exit code of a program that SIGINT ended


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; see --help")
    start.enable_compile_cache()
    # The choice of attention is logged at every compilation, in the middle of the bar.
    logging.getLogger("pyramid_jax.kernels").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sample(flags.FLAGS)
    except KeyboardInterrupt:
        print("interrupted; the same command makes what is not finished")
        sys.exit(INTERRUPTED)


def sample(values: Any) -> None:
    """Does what the flags say; ends the program where they or the numbers are wrong."""
    try:
        mesh = start.parse_mesh(values.mesh)
        pipeline = load(values.model, mesh, values.dtype, offload=values.offload)
        if values.show:
            print(description(pipeline))
            return
        jobs = planned(pipeline, values)
        left = waiting(pipeline, jobs)
    except ValueError as error:
        sys.exit(f"launch.sample: {error}")
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} files are finished already")
    try:
        run(pipeline, left, values.batch)
    except FloatingPointError as error:
        sys.exit(f"launch.sample: {error}")


def planned(pipeline: VideoPipeline, values: Any) -> list[Job]:
    """What the flags ask of a model.

    Raises:
        ValueError: flags that exclude each other, or what the model can't make.
    """
    if (values.prompt is None) == (values.prompts is None):
        raise ValueError("give either --prompt=TEXT or --prompts=FILE; see --help")
    lines = (
        [Line(values.prompt)] if values.prompts is None else read_lines(values.prompts)
    )
    height, width = height_width(values.size) if values.size else (None, None)
    jobs: list[Job] = []
    for line in lines:
        image = line.image or (Path(values.image) if values.image else None)
        if image is not None:
            outputs.fingerprint(image)  # raises
        seed = values.seed + len(jobs) if line.seed is None else line.seed
        request = pipeline.request(
            line.prompt,
            negative_prompt=line.negative or values.negative,
            image=image,
            height=height,
            width=width,
            num_frames=values.frames,
            seconds=values.seconds,
            seed=seed,
            options=options(pipeline, values, image is not None),
        )
        if not values.any_size:
            check_preset(pipeline.defaults, request.size, pipeline.name)
        kind = values.kind or ("png" if request.size.frames == 1 else "mp4")
        for copy in range(values.each):
            name = file_name(len(jobs), line.prompt, seed + copy, kind)
            one = replace(request, seed=seed + copy)
            jobs.append(Job(one, Path(values.to) / name, image, values.scale))
    return jobs


def options(pipeline: VideoPipeline, values: Any, image: bool) -> SampleConfig:
    """Steps and guidance by the flags, or where they say nothing, by the model.

    Raises:
        ValueError: numbers of steps that do not fit the model.
    """
    base = pipeline.defaults.with_image() if image else pipeline.defaults
    stages = len(pipeline.cfg.stages)
    choices = {
        "first_steps": steps(values.steps, stages),
        "video_steps": steps(values.video_steps, stages),
        "last_step": values.last_step,
        "scans": values.scans,
    }
    scales = {
        "first": values.guidance,
        "video": values.video_guidance,
        "decay": values.decay,
        "floor": values.floor,
    }
    guidance = replace(base.guidance, **not_none(scales))
    return replace(base, guidance=guidance, **not_none(choices))


def steps(counts: Sequence[str] | None, stages: int) -> tuple[int, ...] | None:
    """Euler steps of every stage, from one number for each or for all.

    Raises:
        ValueError: anything else.
    """
    if counts is None:
        return None
    if not all(text.isdecimal() for text in counts):
        raise ValueError(f"steps {','.join(counts)} are no numbers; give e.g. 20,20,20")
    return tuple(map(int, counts)) * (stages if len(counts) == 1 else 1)


def run(pipeline: VideoPipeline, jobs: Sequence[Job], batch: int) -> None:
    """Makes all files, and shows the progress."""
    every = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(jobs), bar_format=BAR, smoothing=0, mininterval=every) as bar:
        for group in batches(jobs, batch):
            begun = bar.n
            for render in outputs.make(pipeline, group, progress_bar(bar, len(group))):
                bar.write(str(render.path))
            bar.update(begun + len(group) - bar.n)


def progress_bar(bar: tqdm, videos: int) -> StepCallback:
    """Moves a bar that counts videos after every step of so many of them."""
    begun = bar.n
    bar.set_postfix_str("compiles, or loads what was compiled before")

    def step(progress: Progress) -> None:
        bar.set_postfix_str(str(progress), refresh=False)
        bar.update(begun + progress.done * videos - bar.n)

    return step


def description(pipeline: VideoPipeline) -> str:
    """What a model was made for, and what is recommended for it."""
    defaults, guidance = pipeline.defaults, pipeline.defaults.guidance
    later = defaults.with_image().guidance.video
    sizes = ", ".join(map(str, pipeline.presets)) or "not known"
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
    real = partial(flags.DEFINE_float, flag_values=into)
    switch = partial(flags.DEFINE_bool, flag_values=into)
    texts = partial(flags.DEFINE_list, flag_values=into)
    choice = partial(flags.DEFINE_enum, flag_values=into)
    text("model", str(TINY_LATENT), "folder of the model")
    text("prompt", None, "what the video shows")
    text("prompts", None, "file with a prompt, or a JSON object, on every line")
    text("negative", None, "what it should not show; none: what the model recommends")
    text("image", None, "file of the first frame, scaled to cover, and cropped")
    text("size", None, "HEIGHTxWIDTH in pixels")
    whole("frames", None, "of a video; 1 makes images", lower_bound=1)
    real("seconds", None, "instead of frames; the nearest length that can be made")
    switch("any_size", False, "allow sizes that the model was not made for")
    whole("seed", 0, "of the first video; the others count up", lower_bound=0)
    whole("each", 1, "videos of every prompt", lower_bound=1)
    whole("batch", 1, "videos sampled together", lower_bound=1)
    texts("steps", None, "of every stage, first frame: 20 or 20,20,20")
    texts("video_steps", None, "the same, other frames")
    real("guidance", None, "of the first frame; 0: none at all", lower_bound=0)
    real("video_guidance", None, "of the other frames", lower_bound=0)
    real("decay", None, "guidance falls by so much with every unit of the video")
    real("floor", None, "where falling guidance ends")
    switch("last_step", None, "take each stage's last step, which is 0.001 wide")
    whole("scans", None, "the video in so many runs: less work, more compiling")
    choice("dtype", None, ["float32", "bfloat16"], "of weights and products")
    texts("mesh", None, "devices that share the work, e.g. data=2,fsdp=-1")
    switch("offload", False, "weights wait in the host's memory until they are used")
    text("to", "runs/sample", "folder to write to")
    choice("kind", None, outputs.KINDS, "of files; none: mp4, or png for images")
    whole("scale", 1, "shows pixels as blocks of so many", lower_bound=1)
    switch("show", False, "print what the model was made for, and end")


if __name__ == "__main__":
    define(flags.FLAGS)
    app.run(main)
