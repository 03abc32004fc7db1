# SPDX-License-Identifier: Apache-2.0
"""From requests to video files that say what they were made from.

What made a file is inside it (the comment of mp4, gif and png) and in a JSON file
beside it. Both get their names when they are whole, so that an interruption leaves
only finished files.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import repeat
from jaxtyping import UInt8

import pyramid_jax
from pyramid_jax.config import build
from pyramid_jax.data import pictures, video_io
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.video import Size, VideoPipeline

KINDS = ("mp4", "gif", "png", "npz")
# What of a `SampleConfig` decides how a video looks.
CHOICES = ("first_steps", "video_steps", "guidance", "last_step", "scans")


@dataclass(frozen=True)
class Request:
    """A video that is wanted, or an image, which is a video of one frame.

    Args:
        negative, options: None: those of the model.
        image: file of the first frame, which is scaled to cover the size and cropped;
            None: the first frame is sampled, too.
        scale: shows every pixel as a block of scale x scale, for tiny videos.
    """

    prompt: str
    size: Size
    negative: str | None = None
    seed: int = 0
    options: SampleConfig | None = None
    image: Path | None = None
    scale: int = 1


@dataclass(frozen=True)
class Recipe:
    """What a file is made from, all choices spelled out; equal ones make equal files.

    `image` has the name and the hash of the first frame's file; `options` are the
    `CHOICES` of a `SampleConfig`.
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


def recipe(model: VideoPipeline, request: Request) -> Recipe:
    """What a request means for a model.

    Raises:
        ValueError: no prompt, a first frame for an image, no such image file.
    """
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say what the video shows")
    if request.image is not None and request.size.frames == 1:
        raise ValueError(
            "an image and 1 frame were given, which is that image; ask for more frames"
        )
    negative = request.negative
    if negative is None:
        negative = "" if model.prompts is None else prompts.NEGATIVE
    chosen = asdict(_options(model, request))
    return Recipe(
        prompt=request.prompt,
        negative=negative,
        seed=request.seed,
        **asdict(request.size),
        fps=model.defaults.fps,
        scale=request.scale,
        image=None if request.image is None else _fingerprint(request.image),
        options=json.loads(json.dumps({name: chosen[name] for name in CHOICES})),
        model=model.name,
        dtype=model.cfg.dit.dtype,
    )


def alike(a: Request, b: Request) -> bool:
    """Whether b can be sampled right behind a, in one batch."""
    same = (a.size, a.options, a.image) == (b.size, b.options, b.image)
    return same and b.seed == a.seed + 1


def make(
    model: VideoPipeline, requests: Sequence[Request], paths: Sequence[str | Path]
) -> list[Render]:
    """Samples requests as one batch, and writes a file for each; its suffix says which.

    Files that are there already are replaced.

    Raises:
        ValueError: a request that the model can't make or that no such file can hold,
            or neighbours that are not `alike`.
        FloatingPointError: the numbers of a video are no longer finite.
    """
    paths = [Path(path) for path in paths]
    recipes = [recipe(model, request) for request in requests]
    for request, path in zip(requests, paths, strict=True):
        check_kind(path, request)
    if not all(map(alike, requests, requests[1:])):
        raise ValueError(
            "videos of one batch need one size and equal options, seeds that count up, "
            "and no first frame; make them one by one"
        )
    first = requests[0]
    texts = [request.prompt for request in requests]
    choices = {
        "negative": [recipe.negative for recipe in recipes],
        "seed": first.seed,
        "options": _options(model, first),
    }
    if first.image is None:
        videos = model.text_to_video(texts, first.size, **choices)
    else:
        sides = first.size.height, first.size.width
        image = pictures.read_picture(first.image, sides)
        videos = model.image_to_video(image, texts, first.size.frames, **choices)
    return [save(*each) for each in zip(paths, videos, recipes, strict=True)]


def check_kind(path: Path, request: Request) -> None:
    """Refuses files that can't hold what is wanted.

    Raises:
        ValueError: an unknown suffix, or a single picture for a video.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"{path} has none of the suffixes {', '.join(KINDS)}; use one")
    if kind == "png" and request.size.frames > 1:
        raise ValueError(
            f"a png file holds one frame, but {request.size.frames} were asked for; "
            "write mp4, gif or npz, or ask for 1 frame"
        )


def save(path: Path, video: UInt8[np.ndarray, "f h w 3"], recipe: Recipe) -> Render:
    """Writes a video, or an image, with what made it inside and beside it."""
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "pyramid_jax": pyramid_jax.__version__,
        "jax": jax.__version__,
    }
    about = {"recipe": asdict(recipe), "made": made}
    text = json.dumps(about, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as part:
        _write(part, video, recipe, text)
        with _whole(beside(path)) as part_beside:
            part_beside.write_text(text + "\n", encoding="utf-8")
    return Render(path, recipe, made)


def beside(path: Path) -> Path:
    """The JSON file of a video or image."""
    return path.with_name(f"{path.name}.json")


def read(path: str | Path) -> Render:
    """A finished file, by the JSON file beside it, or without one by what is inside.

    Raises:
        ValueError: no such file, or one that says nothing of what made it.
    """
    path = Path(path)
    try:
        if beside(path).is_file():
            text = beside(path).read_text(encoding="utf-8")
        else:
            text = _inside(path)
        about = json.loads(text)
        made_from = build(Recipe, about["recipe"])
        return Render(path, made_from, about["made"])
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} does not say what it was made from; only files that launch.sample "
            "wrote do"
        ) from error


def _options(model: VideoPipeline, request: Request) -> SampleConfig:
    if request.options is not None:
        return request.options
    return model.defaults if request.image is None else model.defaults.with_image()


def _fingerprint(image: Path) -> str:
    if not image.is_file():
        raise ValueError(f"image {image} is not a file; correct the path")
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    return f"{image.name} sha256:{digest[:16]}"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` if nothing goes wrong."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
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
