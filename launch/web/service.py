# SPDX-License-Identifier: Apache-2.0
"""The service behind a web page: it makes the videos of visitors and lists results.

Nothing here knows what the page looks like; `launch/web/page.py` does, and the limits
of its widgets hold for whatever visitors send. What Gradio does not check is checked
here: long texts, sizes and lengths that do not go together, files that are no images.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from launch.sample import outputs
from launch.sample.outputs import FramesCallback, Job, Render
from launch.sizes import check_trained
from pyramid_jax.config import fields
from pyramid_jax.data import video_io
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.denoise import StepCallback
from pyramid_jax.pipeline.request import VideoRequest
from pyramid_jax.pipeline.sizes import Size, TrainedSize
from pyramid_jax.pipeline.video import VideoPipeline

PROMPT = 1000  # characters
SHOWN = 24  # results
PIXELS = 40_000_000  # of an uploaded image
FORMATS = ("PNG", "JPEG", "WEBP")
LONGEST = 8  # times the length that the model was made for
SIDE = 256  # pixels of a still, and of the smaller side of a small video


class WebForm(NamedTuple):
    """What a visitor asks for, within the limits of the page's widgets.

    `size` is the name of one of the model's; a `seed` of -1 or None is drawn; `image`
    is the path of the uploaded first frame; `preset` is one of `model.PRESETS`; an
    empty text may be None. Of the other values, None is the model's choice.
    """

    prompt: str | None
    size: str
    frames: int
    seed: int | None = None
    image: str | None = None
    negative: str | None = None
    first_steps: int | None = None
    video_steps: int | None = None
    first_guidance: float | None = None
    video_guidance: float | None = None
    preset: str | None = None


class Continuation(NamedTuple):
    """A result that goes on, with another prompt or, without one, with its own."""

    video: Path
    prompt: str | None = None


@dataclass(frozen=True)
class VideoService:
    """A model, the folder of its results, and the folder of visitors' `uploads`.

    Where it `streams`, frames are seen while later ones are sampled, which needs the
    memory of both at once.
    """

    model: VideoPipeline
    folder: Path
    uploads: Path
    streams: bool = True

    def sizes(self) -> dict[str, TrainedSize]:
        """The sizes of videos that the model was made for, its favourite first.

        Raises:
            ValueError: there are none.
        """
        sizes = {p.name: p for p in self.model.sizes if p.frames > 1}
        if not sizes:
            raise ValueError(
                f"the config.json of {self.model.name} names no size of videos; add "
                '"sizes" with [height, width, frames] to its "sample"'
            )
        return sizes

    def job(self, form: WebForm | Continuation) -> Job:
        """What a visitor asks for, as a new file.

        Raises:
            ValueError: the model can't make it, or a text or image is refused; visitors
                may see the message.
        """
        if isinstance(form, Continuation):
            return self._longer(form)
        size, prompt = self.sizes()[form.size], _text("prompt", form.prompt)
        image = None if form.image is None else self.upload(form.image)
        request = self.model.request(
            prompt,
            image=image,
            negative_prompt=_text("negative prompt", form.negative) or None,
            height=size.height,
            width=size.width,
            num_frames=form.frames,
            num_inference_steps=form.first_steps,
            video_num_inference_steps=form.video_steps,
            guidance_scale=form.first_guidance,
            video_guidance_scale=form.video_guidance,
            preset=form.preset or None,
            seed=None if form.seed is None or form.seed < 0 else form.seed,
        )
        check_trained(self.model.defaults, request.size, self.model.name)
        return self._new(request, image)

    def _longer(self, form: Continuation) -> Job:
        """A continuation with the size, steps and guidance of the result."""
        recipe, defaults = self.result(form.video).recipe, self.model.defaults
        size = Size(recipe.height, recipe.width)
        check_trained(defaults, size, self.model.name)
        most = LONGEST * max(known.frames for known in self.sizes().values())
        if recipe.frames >= most:
            raise ValueError(
                f"the video has {recipe.frames} frames already; one of at most "
                f"{most - 1} can be continued"
            )
        # A folder may have results of a model with other options.
        options = fields(SampleConfig, recipe.options)
        options["guidance"] = Guidance(**recipe.options["guidance"])
        frames = video_io.video_frames(form.video, size.height_width, recipe.fps)
        request = self.model.request(
            _text("prompt", form.prompt) or recipe.prompt,
            video=np.stack(list(frames)),
            negative_prompt=recipe.negative,
            options=replace(defaults, **options | {"window": defaults.window}),
        )
        return self._new(request, form.video)

    def _new(self, request: VideoRequest, given: Path | None) -> Job:
        """A new file of a request that begins with a given one."""
        (prompt,), size = request.prompts, request.size
        words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]
        now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        name = f"{now}_{words}_{request.seed}.mp4"
        scale = max(1, SIDE // min(size.height_width))
        job = Job(request, self.folder / name, given, scale)
        outputs.recipe(self.model, job)  # refuses now what can't be written later
        return job

    def make(
        self,
        job: Job,
        on_step: StepCallback | None = None,
        on_frames: FramesCallback | None = None,
    ) -> Render:
        """A finished video, in a new file.

        Args:
            on_step: is called after every Euler step.
            on_frames: is called with new frames, if the service `streams`.

        Raises:
            ValueError: the model can't make it.
            FloatingPointError: the numbers of the video are no longer finite.
        """
        on_frames = on_frames if self.streams else None
        (render,) = outputs.make(self.model, [job], on_step, on_frames)
        logging.info("%s", render.path)
        return render

    def results(self) -> list[Render]:
        """The newest results in the folder, at most `SHOWN`, the newest first.

        Others are left out: links, which may lead anywhere, and files that another
        program made or that have no first frame.
        """
        renders: list[Render] = []
        for path in sorted(self.folder.glob("*.mp4"), key=_age):
            if len(renders) < SHOWN and not path.name.startswith("."):
                with suppress(ValueError, OSError):
                    render = self.result(path)
                    still(render)
                    renders.append(render)
        return renders

    def result(self, path: Path) -> Render:
        """A finished video of the folder.

        Raises:
            ValueError: there is none.
        """
        if any(each.is_symlink() for each in (path, outputs.beside(path))):
            raise ValueError(f"{path} is a link; only files in the folder are shown")
        return outputs.read(path)

    def upload(self, path: str | Path) -> Path:
        """The path of an uploaded image, if it is one.

        Raises:
            ValueError: another path, no image of the `FORMATS`, or too large a one.
        """
        file = Path(path).resolve()
        if not (file.is_relative_to(self.uploads.resolve()) and file.is_file()):
            raise ValueError("the image was not uploaded; upload a file")
        try:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the file is no image that can be read; use {', '.join(FORMATS)}"
            ) from error
        if height * width > PIXELS:
            raise ValueError(
                f"the image has {height} x {width} pixels; use one of at most "
                f"{PIXELS // 10**6} million"
            )
        return file


def still(render: Render) -> UInt8[np.ndarray, "h w 3"]:
    """A small picture of a result's first frame."""
    recipe = render.recipe
    scale = SIDE / max(recipe.height, recipe.width)
    size = round(recipe.height * scale), round(recipe.width * scale)
    return _first_frame(render.path, size, render.path.stat().st_mtime_ns)


def preview(frames: UInt8[np.ndarray, "f h w 3"], fps: float) -> bytes:
    """A small animation of frames as a WebP file, which is played once."""
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((SIDE, SIDE))
    file, duration = BytesIO(), round(1000 / fps)
    how = {"save_all": True, "append_images": images[1:], "loop": 1}
    images[0].save(file, "WEBP", duration=duration, quality=90, method=0, **how)
    return file.getvalue()


def recipe_text(render: Render) -> str:
    """What made a result, in lines for people."""
    recipe = render.recipe
    options, guidance = recipe.options, recipe.options["guidance"]
    given = recipe.image or ""
    begins = "continues" if given.split(" ")[0].endswith(".mp4") else "first frame"
    lines = [
        f"prompt: {recipe.prompt}",
        f"{begins}: {given}" if given else "",
        f"negative prompt: {recipe.negative}" if recipe.negative else "",
        f"seed: {recipe.seed}",
        f"size: {recipe.height}x{recipe.width}, {recipe.frames} frames, "
        f"{recipe.fps:g} per second",
        f"steps: {_sum(options['first_steps'])} for the first frame, "
        f"{_sum(options['video_steps'])} for later ones",
        f"guidance: {guidance['first']:g} for the first frame, {guidance['video']:g} "
        "for later ones",
        f"model: {recipe.model}, {recipe.dtype}",
        f"made: {render.made.get('date', '')}",
    ]
    return "\n".join(line for line in lines if line)


@lru_cache(SHOWN)
def _first_frame(
    path: Path, size: tuple[int, int], changed: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The first frame of a file, read again only when the file has `changed`."""
    return video_io.read_video(path, size, 1, 1)[0]


def _text(name: str, text: str | None) -> str:
    """A text without spaces around it; Gradio's `max_length` is for browsers only."""
    text = (text or "").strip()
    if len(text) > PROMPT:
        raise ValueError(f"the {name} has {len(text)} characters; use at most {PROMPT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ValueError(f"the {name} is not Unicode; type it again") from error
    return text


def _age(path: Path) -> float:
    """Sorts the newest first; what is gone meanwhile comes last."""
    try:
        return -path.lstat().st_mtime_ns
    except OSError:
        return 0


def _sum(steps: Sequence[int]) -> str:
    return " + ".join(map(str, steps))
