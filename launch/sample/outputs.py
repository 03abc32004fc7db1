# SPDX-License-Identifier: Apache-2.0
"""From jobs to video files that say what they were made from.

What made a file is inside it (the comment of mp4, gif and png) and in a JSON file
beside it. Both get their names when they are whole, so that an interruption leaves
only finished files.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import repeat
from jaxtyping import UInt8

import pyramid_jax
from pyramid_jax.config import build
from pyramid_jax.data import pictures, video_io
from pyramid_jax.pipeline.denoise import StepCallback
from pyramid_jax.pipeline.request import VideoRequest
from pyramid_jax.pipeline.video import VideoPipeline

KINDS = ("mp4", "gif", "png", "npz")
# Takes new frames of all videos, `videos _ h w 3`.
FramesCallback = Callable[[UInt8[np.ndarray, "videos _ h w 3"]], None]
# What of a `SampleConfig` decides how a video looks.
CHOICES = ("first_steps", "video_steps", "guidance", "last_step", "scans")


class Job(NamedTuple):
    """One video, or an image, which is a video of one frame, and its file.

    `image` is the file of the first frame, or of a video to continue; `scale` shows
    every pixel as a block of scale x scale, for tiny videos; `records` is the folder of
    what is written besides the file, None: the same one.
    """

    request: VideoRequest
    path: Path
    image: Path | None = None
    scale: int = 1
    records: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """What a file is made from, all choices spelled out; equal ones make equal files.

    `image` is the `fingerprint` of the first frame, or of a video that is continued;
    `options` are the `CHOICES` of a `SampleConfig`, and a window if there is one.
    """

    prompt: str
    negative: str
    seed: int
    height: int
    width: int
    frames: int
    fps: float
    scale: int
    image: str | None
    options: Mapping[str, Any]
    model: str
    dtype: str


class Render(NamedTuple):
    """A finished file; `made` has the date, the device, and versions of programs."""

    path: Path
    recipe: Recipe
    made: Mapping[str, str]


def recipe(pipeline: VideoPipeline, job: Job) -> Recipe:
    """What a job's file is made from.

    Raises:
        ValueError: no prompt, a first frame for an image, no such image file.
    """
    request = job.request
    (prompt,), (negative,) = request.prompts, request.negative_prompts
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the video shows")
    if job.image is not None and request.size.frames == 1:
        raise ValueError(
            "an image and 1 frame were given, which is that image; ask for more frames"
        )
    options = asdict(request.options)
    chosen = (*CHOICES, "window") if options["window"] else CHOICES
    return Recipe(
        prompt=prompt,
        negative=negative,
        seed=request.seed,
        **asdict(request.size),
        fps=pipeline.defaults.fps,
        scale=job.scale,
        image=None if job.image is None else fingerprint(job.image),
        options=json.loads(json.dumps({name: options[name] for name in chosen})),
        model=pipeline.name,
        dtype=pipeline.cfg.dit.precision,
    )


def alike(a: Job, b: Job) -> bool:
    """Whether b can be sampled right behind a, in one batch."""
    one, other = a.request, b.request
    same = (one.size, one.options, a.image) == (other.size, other.options, b.image)
    return same and other.seed == one.seed + 1


def make(
    pipeline: VideoPipeline,
    jobs: Sequence[Job],
    callback_on_step_end: StepCallback | None = None,
    on_frames: FramesCallback | None = None,
) -> list[Render]:
    """Samples jobs as one batch, and writes a file for each; its suffix says which.

    Existing files are replaced.

    Args:
        on_frames: is called with new frames, while later ones are sampled.

    Raises:
        ValueError: a job that the model can't do or that no such file can hold, or
            neighbours that are not `alike`.
        FloatingPointError: the numbers of a video are no longer finite.
    """
    recipes = [recipe(pipeline, job) for job in jobs]
    for job in jobs:
        check_kind(job)
    if not all(map(alike, jobs, jobs[1:])):
        raise ValueError(
            "videos of one batch need one size, equal options and one first frame, and "
            "seeds that count up; make them one by one"
        )
    requests = [job.request for job in jobs]
    batch = replace(
        requests[0],
        prompts=tuple(request.prompts[0] for request in requests),
        negative_prompts=tuple(request.negative_prompts[0] for request in requests),
    )
    if on_frames is None:
        videos = pipeline.run(batch, callback_on_step_end=callback_on_step_end).frames
    else:
        parts = []
        for part in pipeline.streamed(batch, callback_on_step_end=callback_on_step_end):
            on_frames(part)
            parts.append(part)
        videos = np.concatenate(parts, axis=1)
    return [
        save(job.path, video, recipe, job.records)
        for job, video, recipe in zip(jobs, videos, recipes, strict=True)
    ]


def check_kind(job: Job) -> None:
    """Refuses files that can't hold what is wanted.

    Raises:
        ValueError: an unknown suffix, or a single picture for a video.
    """
    kind, frames = job.path.suffix.removeprefix("."), job.request.size.frames
    if kind not in KINDS:
        raise ValueError(
            f"{job.path} has none of the suffixes {', '.join(KINDS)}; use one"
        )
    if kind == "png" and frames > 1:
        raise ValueError(
            f"a png file holds one frame, but {frames} were asked for; write mp4, gif "
            "or npz, or ask for 1 frame"
        )


def save(
    path: Path,
    video: UInt8[np.ndarray, "f h w 3"],
    recipe: Recipe,
    records: Path | None = None,
) -> Render:
    """Writes a video, or an image, with what made it inside, and beside it.

    Args:
        records: another folder for the JSON file, and for files that are not whole.
    """
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "pyramid_jax": pyramid_jax.__version__,
        "jax": jax.__version__,
    }
    text = json.dumps(
        {"recipe": asdict(recipe), "made": made}, indent=1, ensure_ascii=False
    )
    record = beside(path, records)
    for folder in (path.parent, record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with _whole(path, record.parent) as part:
        _write(part, video, recipe, text)
        with _whole(record, record.parent) as part_beside:
            part_beside.write_text(text + "\n", encoding="utf-8")
    return Render(path, recipe, made)


def beside(path: Path, records: Path | None = None) -> Path:
    """The JSON file of a video or image, beside it or in a folder of its own."""
    return (records or path.parent) / f"{path.name}.json"


def read(path: str | Path, records: Path | None = None) -> Render:
    """A finished file, by its JSON file, see `beside`, or else by what is inside.

    Raises:
        ValueError: no such file, or one that says nothing of what made it.
    """
    path = Path(path)
    try:
        if (record := beside(path, records)).is_file():
            text = record.read_text(encoding="utf-8")
        else:
            text = _inside(path)
        record = json.loads(text)
        made_from = build(Recipe, record["recipe"])
        return Render(path, made_from, record["made"])
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} does not say what it was made from; only files that "
            "pyramid-jax sample wrote do"
        ) from error


def fingerprint(image: Path) -> str:
    """The name and the hash of an image file.

    Raises:
        ValueError: there is no such file.
    """
    if not image.is_file():
        raise ValueError(f"image {image} is not a file; correct the path")
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    return f"{image.name} sha256:{digest[:16]}"


@contextmanager
def _whole(path: Path, folder: Path) -> Iterator[Path]:
    """A name in a folder to write to, which becomes `path` if nothing goes wrong."""
    part = folder / f".{path.stem}.part{path.suffix}"
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(
    path: Path, video: UInt8[np.ndarray, "f h w 3"], recipe: Recipe, text: str
) -> None:
    fps, scale = recipe.fps, recipe.scale
    if path.suffix == ".npz":
        np.savez_compressed(path, video=video, about=np.array(text))
    elif path.suffix == ".mp4":
        video_io.write_video(path, video, fps, scale=scale, comment=text)
    else:
        shown = repeat(video, "f h w c -> f (h i) (w j) c", i=scale, j=scale)
        if path.suffix == ".gif":
            pictures.write_gif(path, shown, fps, text)
        else:
            pictures.write_picture(path, shown[0], text)


def _inside(path: Path) -> str:
    """What a file says of itself."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return str(arrays["about"])
    if path.suffix == ".mp4":
        return video_io.read_video_comment(path)
    return pictures.read_picture_comment(path)
