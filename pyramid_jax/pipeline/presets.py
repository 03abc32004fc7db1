# SPDX-License-Identifier: Apache-2.0
"""What a model was made for: sizes, lengths, and what is chosen where nothing is."""

import math
from typing import NamedTuple

from pyramid_jax.pipeline.video import Size, VideoPipeline

# Where no length is given, in seconds; shorter if the model makes no such videos.
USUAL = 5.0


class Preset(NamedTuple):
    """A size that a model was made for.

    `frames` are those of the longest video, 1 for images only; `fps` is in Hz.
    """

    height: int
    width: int
    frames: int
    fps: float

    @property
    def name(self) -> str:
        """Height and width as commands take them, e.g. "384x640"."""
        return f"{self.height}x{self.width}"

    def __str__(self):
        if self.frames == 1:
            return f"{self.name} (images)"
        seconds = self.frames / self.fps
        return f"{self.name} up to {self.frames} frames ({seconds:.2g} s)"


def presets(model: VideoPipeline) -> tuple[Preset, ...]:
    """The sizes that a model was made for, its favourite first; (): not known."""
    made = model.defaults
    return tuple(Preset(*size, fps=made.fps) for size in made.sizes)


def frames(model: VideoPipeline, seconds: float) -> int:
    """The number of frames that a model can make nearest to so many seconds.

    Raises:
        ValueError: no positive number of seconds.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"{seconds} seconds: expected a positive, finite number")
    stride = model.cfg.latent.temporal
    units = (seconds * model.defaults.fps - 1) / stride
    return 1 + max(0, math.ceil(units - 0.5)) * stride


def sides(text: str) -> tuple[int, int]:
    """Height and width from text such as "384x640".

    Raises:
        ValueError: anything else.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"size {text!r} is not HEIGHTxWIDTH; write e.g. 384x640")
    return int(numbers[0]), int(numbers[1])


def choose(
    model: VideoPipeline,
    size: tuple[int, int] | None = None,
    count: int | None = None,
    any_size: bool = False,
) -> Size:
    """The size of a video; what is not given becomes the favourite, and `USUAL` long.

    Args:
        size: height and width in pixels.
        count: frames.
        any_size: allows what the model was not made for, but has the shape for.

    Raises:
        ValueError: the model was not made for it, or can't make it at all.
    """
    known = presets(model)
    if size is None:
        if not known:
            raise ValueError(
                "the config.json of this model does not say for which sizes it was "
                "made; give height and width"
            )
        size = known[0].height, known[0].width
    if count is None:
        fitting = [preset for preset in known if preset[:2] == size] or known
        count = min([*(preset.frames for preset in fitting), frames(model, USUAL)])
    chosen = Size(*size, count)
    check(model, chosen, any_size)
    return chosen


def check(model: VideoPipeline, size: Size, any_size: bool = False) -> None:
    """Refuses sizes that a model was not made for.

    Args:
        any_size: refuses only what its layers have no shape for.

    Raises:
        ValueError: with the sizes and lengths that are allowed.
    """
    known = presets(model)
    fits = any(
        (size.height, size.width) == preset[:2] and size.frames <= preset.frames
        for preset in known
    )
    if known and not fits and not any_size:
        allowed = ", ".join(map(str, known))
        raise ValueError(
            f"{size.height}x{size.width} with {size.frames} frames was asked for, but "
            f"{model.name or 'this model'} was made for {allowed}; choose one of "
            "these, or allow any size if its weights were trained on others"
        )
    latent, stages = model.cfg.latent, len(model.cfg.stages)
    latent.grid(size.height, size.width, model.cfg.layout.patch, stages)
    latent.frames(size.frames)
