# SPDX-License-Identifier: Apache-2.0
"""What stands behind a web page: wishes within limits, and the results so far.

Nothing here knows what the page looks like; `launch/web.py` does. Visitors are not
trusted: whatever they send is checked here, even if the page would not have sent it.
"""

import logging
import random
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

from PIL import Image

from launch.sample import outputs
from launch.sample.outputs import Render, Request
from pyramid_jax.data import pictures, video_io
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline import presets
from pyramid_jax.pipeline.denoise import Progress, Watch
from pyramid_jax.pipeline.presets import Preset
from pyramid_jax.pipeline.video import Size, VideoPipeline

PROMPT = 1000  # characters
STEPS = 100  # of a stage
GUIDANCE = 20.0
SEEDS = 2**31
SHOWN = 24  # results
PIXELS = 40_000_000  # of an uploaded image
FORMATS = ("PNG", "JPEG", "WEBP")
SIDE = 256  # pixels of a still, and of the smaller side of a small video


class WebForm(NamedTuple):
    """What a visitor wants, as it came: nothing is checked.

    `size` is the name of a preset, a `seed` of -1 or None is drawn; `image` is the
    path of the uploaded first frame. Of the other values, None is the model's choice.
    """

    prompt: Any
    size: Any
    frames: Any
    seed: Any = None
    image: Any = None
    negative: Any = None
    first_steps: Any = None
    video_steps: Any = None
    first_guidance: Any = None
    video_guidance: Any = None


@dataclass(frozen=True)
class Studio:
    """A model, the folder of its results, and one that the page may show files of.

    Visitors' `uploads` come to the latter, too. One video is made at a time.
    """

    model: VideoPipeline
    folder: Path
    uploads: Path
    busy: Lock = field(default_factory=Lock)
    closed: Event = field(default_factory=Event)

    def sizes(self) -> tuple[Preset, ...]:
        """The sizes of videos that the model was made for, its favourite first.

        Raises:
            ValueError: there are none.
        """
        known = [size for size in presets.presets(self.model) if size.frames > 1]
        if not known:
            raise ValueError(
                f"the config.json of {self.model.name} names no size of videos; add "
                '"sizes" with [height, width, frames] to its "sample"'
            )
        return tuple(known)

    def size(self, name: Any) -> Preset:
        """The size of that name; ValueError if there is none."""
        known = {size.name: size for size in self.sizes()}
        if (size := known.get(str(name))) is None:
            raise ValueError(f"size {_cut(name)}: expected one of {', '.join(known)}")
        return size

    def request(self, form: WebForm) -> Request:
        """What a visitor wants, if it is within the limits.

        Raises:
            ValueError: it is not; the text can be shown to the visitor.
        """
        preset = self.size(form.size)
        frames = _whole("frames", form.frames, 1, preset.frames)
        size = Size(preset.height, preset.width, frames)
        presets.check(self.model, size)
        seed = -1 if form.seed is None else _whole("seed", form.seed, -1, SEEDS - 1)
        negative = _text("negative prompt", form.negative or "")
        return Request(
            prompt=_text("prompt", form.prompt),
            size=size,
            negative=negative or None,
            seed=random.randrange(SEEDS) if seed < 0 else seed,
            options=self._options(form),
            image=None if form.image is None else self.upload(form.image),
            scale=max(1, SIDE // min(size.height, size.width)),
        )

    def make(self, form: WebForm, watch: Watch | None = None) -> Render:
        """A finished video, in a new file.

        Args:
            watch: is told of every Euler step that has ended.

        Raises:
            ValueError: the form is not within the limits, or the studio was closed.
            FloatingPointError: the numbers of the video are no longer finite.
        """
        request = self.request(form)
        words = re.sub(r"[^a-z0-9]+", "_", request.prompt.lower()).strip("_")[:40]
        name = f"{time.strftime('%Y%m%d-%H%M%S')}_{words}_{request.seed}.mp4"

        def step(at: Progress) -> None:
            self._still_open()
            if watch is not None:
                watch(at)

        model = replace(self.model, watch=step)
        with self.busy:
            self._still_open()
            (made,) = outputs.make(model, [request], [self.folder / name])
        logging.info("%s", made.path)
        return made

    def close(self) -> None:
        """Ends the video that is being made with its next step, and waits for that."""
        self.closed.set()
        with self.busy:
            pass

    def _still_open(self) -> None:
        if self.closed.is_set():
            raise ValueError("the page was closed before the video was finished")

    def results(self) -> list[Render]:
        """The newest results in the folder, at most `SHOWN`, the newest first."""
        files = [p for p in self.folder.glob("*.mp4") if p.name[0] != "."]
        found: list[Render] = []
        for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
            if len(found) == SHOWN:
                break
            try:
                found.append(outputs.read(path))
            except ValueError as error:
                logging.debug("not shown: %s", error)
        return found

    def copy(self, render: Render) -> Path:
        """A copy of a result's file among the uploads: nothing else is shown."""
        copy = self._place(render) / render.path.name
        if not copy.exists():
            part = copy.with_name(f".{random.randrange(SEEDS)}.part")
            shutil.copyfile(render.path, part)
            part.replace(copy)  # at once, as many may look
        return copy

    def still(self, render: Render) -> Path:
        """A small picture of a result's first frame, among the uploads."""
        still = self._place(render) / "still.png"
        if not still.exists():
            recipe = render.recipe
            less = SIDE / max(recipe.height, recipe.width)
            size = round(recipe.height * less), round(recipe.width * less)
            part = still.with_name(f".{random.randrange(SEEDS)}.part")
            pictures.write_picture(part, video_io.read_image(render.path, size))
            part.replace(still)
        return still

    def _place(self, render: Render) -> Path:
        """A folder for what is shown of a result, another one if its file changes."""
        changed = render.path.stat().st_mtime_ns
        place = self.uploads / "shown" / f"{render.path.stem}-{changed}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def upload(self, path: Any) -> Path:
        """The path of an uploaded image, if it is one.

        Raises:
            ValueError: another path, no image of the `FORMATS`, or too large a one.
        """
        file = Path(str(path)).resolve()
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

    def _options(self, form: WebForm) -> SampleConfig:
        """The model's choices, with those of the visitor."""
        options, stages = self.model.defaults, len(self.model.cfg.stages)
        if form.image is not None:
            options = options.with_image()
        steps = {
            name: (_whole("steps", value, 1, STEPS),) * stages
            for name in ("first_steps", "video_steps")
            if (value := getattr(form, name)) is not None
        }
        scales = {
            name: _number("guidance", value, 0, GUIDANCE)
            for name in ("first", "video")
            if (value := getattr(form, f"{name}_guidance")) is not None
        }
        return replace(options, guidance=replace(options.guidance, **scales), **steps)


def told(render: Render) -> str:
    """What made a result, in lines for people."""
    recipe = render.recipe
    options, guidance = recipe.options, recipe.options["guidance"]
    lines = [
        f"prompt: {recipe.prompt}",
        f"first frame: {recipe.image}" if recipe.image else "",
        f"negative prompt: {recipe.negative}" if recipe.negative else "",
        f"seed: {recipe.seed}",
        f"size: {recipe.height}x{recipe.width}, {recipe.frames} frames, "
        f"{recipe.fps:g} per second",
        f"steps: {_stages(options['first_steps'])} for the first frame, "
        f"{_stages(options['video_steps'])} for later ones",
        f"guidance: {guidance['first']:g} for the first frame, {guidance['video']:g} "
        "for later ones",
        f"model: {recipe.model}, {recipe.dtype}",
        f"made: {render.made.get('date', '')}",
    ]
    return "\n".join(line for line in lines if line)


def _text(name: str, value: Any) -> str:
    text = str(value or "").strip()
    if len(text) > PROMPT:
        raise ValueError(f"the {name} has {len(text)} characters; use at most {PROMPT}")
    return text


def _number(name: str, value: Any, low: float, high: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        raise ValueError(
            f"{name} {_cut(value)}: expected a number from {low:g} to {high:g}"
        )
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if not number.is_integer():
        raise ValueError(f"{name} {value}: expected a whole number")
    return int(number)


def _cut(value: Any) -> str:
    """A value as a visitor may see it, however long it is."""
    return repr(value)[:40]


def _stages(steps: Any) -> str:
    return " + ".join(map(str, steps))
