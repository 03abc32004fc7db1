# SPDX-License-Identifier: Apache-2.0
r"""Makes videos and images from prompts.

    python -m launch.sample --prompt="a red circle moves left"
    python -m launch.sample --model=MODEL --prompt="a lighthouse at dusk" --seconds=5
    python -m launch.sample --model=MODEL --prompt="waves" --image=first.jpg --each=3
    python -m launch.sample --model=MODEL --prompts=list.txt --batch=4 --mesh=data=4
    python -m launch.sample --model=MODEL --show

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
from launch.sample import lists, outputs
from launch.sample.lists import Job
from launch.sample.outputs import Request
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline import presets, video
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.video import VideoPipeline

BAR = "{n:.2f}/{total} |{bar:20}| {elapsed}<{remaining}{postfix}"
INTERRUPTED = 130  # the exit code of a program that SIGINT ended


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; see --help")
    start.enable_compile_cache()
    # Which attention is used is told at every compilation, in the middle of the bar.
    logging.getLogger("pyramid_jax.kernels").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sample(flags.FLAGS)
    except KeyboardInterrupt:
        print("interrupted; the same command makes what is not finished")
        sys.exit(INTERRUPTED)


def sample(given: Any) -> None:
    """Does what the flags say; ends the program where they or the numbers are wrong."""
    try:
        mesh = start.parse_mesh(given.mesh)
        model = video.load(given.model, mesh, given.dtype, offload=given.offload)
        if given.show:
            print(about(model))
            return
        jobs = planned(model, given)
        left = lists.waiting(model, jobs)
    except ValueError as error:
        sys.exit(f"launch.sample: {error}")
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} files are finished already")
    try:
        run(model, left, given.batch)
    except FloatingPointError as error:
        sys.exit(f"launch.sample: {error}")


def planned(model: VideoPipeline, given: Any) -> list[Job]:
    """What the flags ask of a model.

    Raises:
        ValueError: flags that exclude each other, or what the model can't make.
    """
    if (given.prompt is None) == (given.prompts is None):
        raise ValueError("give either --prompt=TEXT or --prompts=FILE; see --help")
    if given.frames is not None and given.seconds is not None:
        raise ValueError("give --frames or --seconds, not both")
    count = given.frames
    if given.seconds is not None:
        count = presets.frames(model, given.seconds)
    sides = None if given.size is None else presets.sides(given.size)
    like = Request(
        given.prompt or "",
        presets.choose(model, sides, count, given.any_size),
        given.negative,
        given.seed,
        image=None if given.image is None else Path(given.image),
        scale=given.scale,
    )
    if given.prompts is None:
        wanted = lists.copies(like, given.each)
    else:
        wanted = lists.read_requests(given.prompts, like, given.each)
    wanted = [replace(r, options=options(model, given, r)) for r in wanted]
    kind = given.kind or ("png" if like.size.frames == 1 else "mp4")
    return lists.jobs(wanted, given.to, kind)


def options(model: VideoPipeline, given: Any, request: Request) -> SampleConfig:
    """Steps and guidance by the flags, or where they say nothing, by the model.

    Raises:
        ValueError: numbers of steps that do not fit the model.
    """
    base = model.defaults if request.image is None else model.defaults.with_image()
    stages = len(model.cfg.stages)
    chosen = {
        "first_steps": steps(given.steps, stages),
        "video_steps": steps(given.video_steps, stages),
        "last_step": given.last_step,
        "scans": given.scans,
    }
    strength = {
        "first": given.guidance,
        "video": given.video_guidance,
        "decay": given.decay,
        "floor": given.floor,
    }
    guidance = replace(base.guidance, **known(strength))
    made = replace(base, guidance=guidance, **known(chosen))
    made.sampler(model.cfg)  # raises
    return made


def known(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def steps(given: Sequence[str] | None, stages: int) -> tuple[int, ...] | None:
    """Euler steps of every stage, from one number for each or for all.

    Raises:
        ValueError: anything else.
    """
    if given is None:
        return None
    if not all(text.isdecimal() for text in given):
        raise ValueError(f"steps {','.join(given)} are no numbers; give e.g. 20,20,20")
    return tuple(map(int, given)) * (stages if len(given) == 1 else 1)


def run(model: VideoPipeline, jobs: Sequence[Job], batch: int) -> None:
    """Makes all files, and shows how far it is."""
    every = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(jobs), bar_format=BAR, smoothing=0, mininterval=every) as bar:
        for group in lists.batches(jobs, batch):
            begun = bar.n
            requests, paths = zip(*group, strict=True)
            made = outputs.make(watched(model, bar, len(group)), requests, paths)
            bar.update(begun + len(group) - bar.n)
            for render in made:
                bar.write(str(render.path))


def watched(model: VideoPipeline, bar: tqdm, videos: int) -> VideoPipeline:
    """The model, telling a bar that counts videos of every step of so many of them."""
    begun = bar.n
    bar.set_postfix_str("compiles, or loads what was compiled before")

    def watch(at: Progress) -> None:
        bar.set_postfix_str(str(at), refresh=False)
        bar.update(begun + at.done * videos - bar.n)

    return replace(model, watch=watch)


def about(model: VideoPipeline) -> str:
    """What a model was made for, and what is recommended for it."""
    made, guidance = model.defaults, model.defaults.guidance
    later = made.with_image().guidance.video
    sizes = presets.presets(model)
    return (
        f"model: {model.name}\n"
        f"sizes: {', '.join(map(str, sizes)) or 'not known'}, at {made.fps:g} fps\n"
        f"steps: {made.first_steps} for the first frame, then {made.video_steps}\n"
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
    text("model", str(video.TINY_LATENT), "folder of the model")
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
