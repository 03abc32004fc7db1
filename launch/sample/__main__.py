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

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from launch import start
from launch.sample import outputs
from launch.sample.lists import Line, file_name, read_lines, waiting
from launch.sample.outputs import Job
from launch.sample.progress import run
from launch.sizes import check_preset, height_width
from pyramid_jax.data.pictures import read_picture
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.folder import TINY_LATENT
from pyramid_jax.pipeline.presets import check_seconds
from pyramid_jax.pipeline.request import check_seed, check_text, not_none
from pyramid_jax.pipeline.video import VideoPipeline, load
from pyramid_jax.sampler import Guidance

UNREAD = (8, 8)  # pixels that an image is read in to see whether it can be


def sample(values: Any) -> None:
    """Does what the flags say.

    Raises:
        ValueError: what can't be done, before anything is made; most of it before the
            model is loaded.
    """
    mesh = start.parse_mesh(values.mesh)
    lines = [] if values.show else given_lines(values)
    how = {"offload": values.offload, "unrolled": values.unrolled}
    pipeline = load(values.model, mesh, values.dtype, **how)
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
    own = Path(values.image) if values.image else None
    lines = [line._replace(image=line.image or own) for line in lines]
    for number, line in enumerate(lines):
        check_text(line.prompt)
        check_text(line.negative or values.negative or "")
        counted = values.seed + number * values.each
        check_seed(counted if line.seed is None else line.seed, values.each)
    for image in {line.image for line in lines if line.image is not None}:
        read_picture(image, UNREAD)
    if values.size:
        height_width(values.size)
    if values.seconds is not None:
        check_seconds(values.seconds)
    for counts in (values.steps, values.video_steps):
        steps(counts, 1)
    Guidance(**scales(values))
    start.check_writable(values.to)
    return lines


def planned(pipeline: VideoPipeline, values: Any, lines: Sequence[Line]) -> list[Job]:
    """The files to make.

    Raises:
        ValueError: what the model can't make.
    """
    height, width = height_width(values.size) if values.size else (None, None)
    jobs: list[Job] = []
    for line in lines:
        image = line.image
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
    guidance = replace(base.guidance, **scales(values))
    return replace(base, guidance=guidance, **not_none(choices))


def scales(values: Any) -> dict[str, float]:
    """The scales of guidance that flags give, by the names of `Guidance`."""
    given = {
        "first": values.guidance,
        "video": values.video_guidance,
        "decay": values.decay,
        "floor": values.floor,
    }
    return not_none(given)


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
    text("prompt", None, "What the video shows.")
    text("prompts", None, "File with a prompt, or a JSON object, on every line.")
    text("negative", None, "What it does not show; none: what the model recommends.")
    text("image", None, "File of the first frame, scaled to cover, and cropped.")
    whole("seed", 0, "Seed of the first video; the others count up.", lower_bound=0)
    whole("each", 1, "Videos of every prompt.", lower_bound=1, upper_bound=10_000)
    text("size", None, "HEIGHTxWIDTH in pixels.")
    whole("frames", None, "Frames of a video; 1 makes images.", lower_bound=1)
    real("seconds", None, "Length instead of --frames; the nearest that can be made.")
    switch("any_size", False, "Allow sizes that the model was not made for.")
    texts("steps", None, "Steps of every stage, first frame: 20 or 20,20,20.")
    texts("video_steps", None, "Steps of every stage, other frames.")
    real("guidance", None, "Guidance of the first frame; 0: none.", lower_bound=0)
    real("video_guidance", None, "Guidance of the other frames.", lower_bound=0)
    real("decay", None, "Guidance falls by so much with every unit of the video.")
    real("floor", None, "Falling guidance ends here.")
    switch("last_step", None, "Take each stage's last step, which is 0.001 wide.")
    text("model", str(TINY_LATENT), "Folder of the model.")
    switch("show", False, "Print what the model was made for, and end.")
    choice("dtype", None, ["float32", "bfloat16"], "Type of weights and products.")
    texts("mesh", None, "Devices that share the work, e.g. data=2,fsdp=-1.")
    switch("offload", False, "Weights wait in the host's memory until they are used.")
    switch("unrolled", False, "Blocks are compiled one by one: slowly, for fast steps.")
    whole("batch", 1, "Videos sampled together.", lower_bound=1)
    whole("scans", None, "Divide a video into so many runs: less work, more compiling.")
    text("to", "runs/sample", "Folder to write to.")
    choice("kind", None, outputs.KINDS, "Kind of files; none: mp4, or png for images.")
    scale_help = "Show every pixel as a block of so many."
    whole("scale", 1, scale_help, lower_bound=1, upper_bound=64)


HEADINGS = {
    "prompt": "what to make",
    "size": "size and length",
    "steps": "how close to the prompt, and how exact",
    "model": "model and devices",
    "to": "files",
}

if __name__ == "__main__":
    start.run(sample, define, HEADINGS)
