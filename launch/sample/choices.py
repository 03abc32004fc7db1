# SPDX-License-Identifier: Apache-2.0
"""Flags of commands that sample: size and length, steps and guidance, the model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from absl import flags

from launch.sample.lists import Line
from launch.sizes import check_trained, height_width
from launch.start import parse_mesh
from pyramid_jax.data.video_io import video_frames, video_size
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import PRESET_NOTES, PRESETS, SampleConfig
from pyramid_jax.pipeline.folder import DTYPES, PAIRS
from pyramid_jax.pipeline.request import VideoRequest, not_none
from pyramid_jax.pipeline.sizes import check_seconds, clip_size
from pyramid_jax.pipeline.video import VideoPipeline, load
from pyramid_jax.pyramid import RENOISING

HEADINGS = MappingProxyType(
    {
        "size": "size and length",
        "steps": "how close to the prompt, and how exact",
        "model": "model and devices",
    }
)


def define_choices(into: flags.FlagValues) -> None:
    """Defines the flags."""
    text = partial(flags.DEFINE_string, flag_values=into)
    whole = partial(flags.DEFINE_integer, flag_values=into)
    real = partial(flags.DEFINE_float, flag_values=into)
    switch = partial(flags.DEFINE_bool, flag_values=into)
    texts = partial(flags.DEFINE_list, flag_values=into)
    choice = partial(flags.DEFINE_enum, flag_values=into)
    text("size", None, "HEIGHTxWIDTH in pixels.")
    whole("frames", None, "Frames of a video; 1 makes images.", lower_bound=1)
    real("seconds", None, "Length instead of --frames; the nearest that can be made.")
    switch("any_size", False, "Allow sizes that the model was not made for.")
    texts("steps", None, "Steps of every stage, first frame: 20 or 20,20,20.")
    texts("video_steps", None, "Steps of every stage, other frames.")
    real("guidance", None, "Guidance of the first frame; 0: none.", lower_bound=0)
    real("video_guidance", None, "Guidance of the other frames.", lower_bound=0)
    whole("window", None, "Units seen at most, first and newest.", lower_bound=1)
    real("decay", None, "Guidance falls by so much with every unit of the video.")
    real("floor", None, "Falling guidance ends here.")
    notes = "; ".join(f"{name}: {note}" for name, note in PRESET_NOTES.items())
    choice(
        "preset", None, sorted(PRESETS), f"{notes}. None: what the model was made for."
    )
    switch("reuse", None, "Reuse keys and values, as memory allows: the same videos.")
    switch("last_step", None, "Take each stage's last step, which is 0.001 wide.")
    renoising = "What jumps between stages add; none: what the model was made for."
    choice("renoising", None, RENOISING, renoising)
    text("model", str(PAIRS), "Folder of the model.")
    texts("lora", None, "Files of adapters, each as FILE or FILE:STRENGTH.")
    choice("dtype", None, DTYPES, "Type of weights, and of products.")
    texts("mesh", None, "Devices that share the work, e.g. data=2,fsdp=-1.")
    switch("offload", False, "Weights wait in the host's memory until they are used.")
    switch("unrolled", False, "Blocks are compiled one by one: slowly, for fast steps.")
    whole("scans", None, "Divide a video into so many runs: less work, more compiling.")


def check_choices(values: Any) -> None:
    """Checks what can be checked without a model.

    Raises:
        ValueError: sizes, lengths, steps or scales that no model can use.
    """
    if values.size:
        height_width(values.size)
    if values.seconds is not None:
        check_seconds(values.seconds)
    lora_files(values.lora)
    for counts in (values.steps, values.video_steps):
        steps(counts, 1)
    Guidance(**scales(values))


def chosen_model(values: Any, model: str | None = None) -> VideoPipeline:
    """The model of the flags, or another one, on the devices that the flags name.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    return load(
        model or values.model,
        parse_mesh(values.mesh),
        values.dtype,
        offload=values.offload,
        unrolled=values.unrolled,
        lora=lora_files(values.lora),
    )


def lora_files(texts: Sequence[str] | None) -> dict[str | Path, float]:
    """Files of adapters and their strengths, from texts "FILE" and "FILE:STRENGTH".

    Raises:
        ValueError: a strength that is no number.
    """
    files: dict[str | Path, float] = {}
    for text in texts or ():
        file, _, strength = text.partition(".safetensors:")
        try:
            files[f"{file}.safetensors" if strength else text] = float(strength or 1)
        except ValueError as error:
            raise ValueError(
                f"--lora={text}: {strength!r} is no number; give FILE or FILE:STRENGTH"
            ) from error
    return files


def requested(
    pipeline: VideoPipeline, values: Any, line: Line, seed: int
) -> VideoRequest:
    """What flags ask of a model for a line of a list.

    Raises:
        ValueError: what the model can't make.
    """
    height, width = height_width(values.size) if values.size else (None, None)
    video = None
    if line.video is not None:
        size = clip_size(pipeline.defaults, video_size(line.video))
        size = (height, width) if height and width else size
        frames = video_frames(line.video, size, pipeline.defaults.fps)
        video = np.stack(list(frames))
    request = pipeline.request(
        line.prompt,
        negative_prompt=line.negative or values.negative,
        image=line.image,
        video=video,
        height=height,
        width=width,
        num_frames=values.frames,
        seconds=values.seconds,
        seed=seed,
        options=options(pipeline, values, line.image is not None),
    )
    if not values.any_size:
        size = request.size if video is None else replace(request.size, frames=1)
        check_trained(pipeline.defaults, size, pipeline.name)
    return request


def options(pipeline: VideoPipeline, values: Any, image: bool) -> SampleConfig:
    """Steps and guidance by the flags, or where they say nothing, by the model.

    Raises:
        ValueError: numbers of steps that do not fit the model.
    """
    base = pipeline.defaults.with_image() if image else pipeline.defaults
    if values.preset is not None:
        base = base.with_preset(values.preset)
    stages = len(pipeline.cfg.stages)
    choices = {
        "first_steps": steps(values.steps, stages),
        "video_steps": steps(values.video_steps, stages),
        "last_step": values.last_step,
        "scans": values.scans,
        "renoising": values.renoising,
        "reuse": values.reuse,
        "window": values.window,
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
