# SPDX-License-Identifier: Apache-2.0
"""What a model was made for: sizes, lengths, and what is used where nothing is said."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from pyramid_jax.model import ModelConfig, SampleConfig

# Of a video for which no length is given, in seconds; less if the model makes none.
USUAL_SECONDS = 5.0
MOST_SECONDS = 24 * 60 * 60  # nobody asks for more than a day


@dataclass(frozen=True)
class Size:
    """The size of a video in pixels and frames; one frame is an image."""

    height: int
    width: int
    frames: int = 1

    @property
    def height_width(self) -> tuple[int, int]:
        """Without the frames."""
        return self.height, self.width


class TrainedSize(NamedTuple):
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


def trained_sizes(defaults: SampleConfig) -> tuple[TrainedSize, ...]:
    """The sizes that a model was made for, its favourite first, or ()."""
    return tuple(TrainedSize(*size, fps=defaults.fps) for size in defaults.sizes)


def nearest_frames(seconds: float, cfg: ModelConfig, defaults: SampleConfig) -> int:
    """The number of frames that a model can make nearest to so many seconds.

    Raises:
        ValueError: no positive number of seconds.
    """
    check_seconds(seconds)
    stride = cfg.latent.temporal
    units = (seconds * defaults.fps - 1) / stride
    return 1 + max(0, math.ceil(units - 0.5)) * stride


def check_seconds(seconds: float) -> None:
    """Raises ValueError unless it is a positive number, at most `MOST_SECONDS`."""
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(
            f"{seconds} seconds: expected a positive number up to {MOST_SECONDS}"
        )


def default_size(
    cfg: ModelConfig,
    defaults: SampleConfig,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Size:
    """The size of a video; what is not given is the favourite, `USUAL_SECONDS` long.

    Raises:
        ValueError: height or width alone, or neither although no size is known.
    """
    sizes = trained_sizes(defaults)
    if (height is None) != (width is None):
        raise ValueError(
            f"height {height} and width {width} were given; give both, or neither for "
            "the size that the model was made for"
        )
    if height is None or width is None:
        if not sizes:
            raise ValueError(
                "the config.json of this model does not say for which sizes it was "
                "made; give height and width"
            )
        height, width = sizes[0].height, sizes[0].width
    if frames is None:
        fitting = [known for known in sizes if known[:2] == (height, width)]
        usual = nearest_frames(USUAL_SECONDS, cfg, defaults)
        frames = min([*(known.frames for known in fitting or sizes), usual])
    return Size(height, width, frames)


def clip_size(defaults: SampleConfig, own: tuple[int, int]) -> tuple[int, int]:
    """Height and width in which a model continues a video that has its own."""
    sizes = [size[:2] for size in trained_sizes(defaults)]
    return own if own in sizes or not sizes else sizes[0]


def continued_frames(cfg: ModelConfig, frames: int) -> int:
    """How many frames of a video can be continued: those of whole units."""
    unit = cfg.latent.temporal * cfg.layout.frames_per_unit
    return 1 + (frames - 1) // unit * unit


def longest_window(cfg: ModelConfig, defaults: SampleConfig, size: Size) -> int | None:
    """How many units were seen in training, if a video has more; see `SampleConfig`."""
    sizes = trained_sizes(defaults)
    fitting = [known for known in sizes if known[:2] == size.height_width]
    longest = max((known.frames for known in fitting or sizes), default=size.frames)
    if size.frames <= longest:
        return None
    frames = cfg.latent.frames(continued_frames(cfg, longest))
    return max(1, cfg.layout.units(frames) - 1)


def latent_shape(cfg: ModelConfig, size: Size) -> tuple[int, int, int, int]:
    """The shape (t, h, w, c) of the latents of a video.

    Raises:
        ValueError: a size or length that the model's layers have no shape for.
    """
    patch, stages = cfg.layout.patch, len(cfg.stages)
    grid = cfg.latent.grid(size.height, size.width, patch, stages)
    frames = cfg.latent.frames(size.frames)
    cfg.layout.units(frames)
    return (frames, *grid, cfg.latent.channels)
