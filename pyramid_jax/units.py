# SPDX-License-Identifier: Apache-2.0
"""The units that a video is sampled in: with how many steps, and what each one sees."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pyramid_jax import layout, pyramid
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import Array


class Unit(NamedTuple):
    """One autoregressive step, the units for which there are slots, its own frames.

    `index` may be traced. A unit with one slot is unit 0, which has no history: the
    first frame, or a whole sequence. Without slots, the network remembers what the unit
    before has seen at stage 0.
    """

    index: int | Int[Array, ""]
    slots: int | None
    frames: int = 1

    def clips(self, stage: int, cut: Layout) -> tuple[Clip, ...]:
        """The frames that the unit reads at a stage, and last its own."""
        if self.slots is None:
            return layout.recent_clips(stage, self.index, cut.frames_per_unit)
        if self.slots == 1:
            return (layout.first_clip(stage, self.frames),)
        at = stage, self.index, self.slots
        return layout.clips(*at, cut.frames_per_unit, cut.history)


@dataclass(frozen=True)
class SamplerPlan:
    """How one model samples videos.

    Args:
        first_steps, video_steps: Euler steps of each stage, of unit 0 and of others.
        last_step: False leaves out each stage's last step, which is 0.001 wide.
        scans: the units are divided into so many scans, each with no more history slots
            than it needs: less padding, for as many more traces.
        reuse: the stages at which the network remembers text and what it has seen at
            stage 0, from unit to unit: the same numbers, for memory.
        clean_history: what the network makes of text and history does not depend on the
            step, so that stages with reuse read them once in a unit.
        window: how many units a unit sees at most, the first one and the newest, as if
            there had been no others; None: all. A video that is longer reuses nothing.
        begin: how many units are given, if any are.

    Raises:
        ValueError: steps that are not one positive number for each stage, no scan, no
            window, or reuse at a stage that does not exist.
    """

    stages: tuple[Stage, ...] = field(default_factory=pyramid.stages)
    layout: Layout = field(default_factory=Layout)
    first_steps: tuple[int, ...] = (20, 20, 20)
    video_steps: tuple[int, ...] = (10, 10, 10)
    gamma: float = 1 / 3
    last_step: bool = True
    scans: int = 1
    reuse: tuple[int, ...] = ()
    clean_history: bool = False
    window: int | None = None
    begin: int = 1

    def __post_init__(self):
        for name in ("first_steps", "video_steps"):
            steps = getattr(self, name)
            if len(steps) != len(self.stages):
                raise ValueError(
                    f"{name}={steps} must have one entry for each of the "
                    f"{len(self.stages)} stages"
                )
            for count in steps:
                pyramid.sigmas(count, self.last_step)  # raises
        for name in ("scans", "window", "begin"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        if not set(self.reuse) <= set(range(len(self.stages))):
            raise ValueError(
                f"reuse={self.reuse} must name stages, of 0 to {len(self.stages) - 1}"
            )

    def sigmas(self, stage: int, unit: Unit) -> Float[np.ndarray, "steps 2"]:
        """Sigma at the start and at the end of every Euler step of a stage."""
        steps = self.first_steps if unit.slots == 1 else self.video_steps
        sigmas = pyramid.sigmas(steps[stage], self.last_step)
        return np.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(np.float32)

    def spans(self, frames: int, given: bool = False) -> list[tuple[int, int]]:
        """The units of a video of `frames` to sample after those that are given.

        They come as [begin, end) per scan; unit 0 is not among them.

        Units that come before all stages remember are alone. Other scans have about
        equal numbers of units.

        Args:
            given: the first frame is not sampled.

        Raises:
            ValueError: the frames are not a whole number of units, or those of a model
                that can't continue a frame.
        """
        if given and self.layout.history == layout.NONE:
            raise ValueError(
                "this model makes all frames of a video at once (history 'none') and "
                "can't continue an image; give no first frame, or a model with history"
            )
        units = max(1, self.layout.units(frames))
        remembering = [k for k in self.reuse if self.remembered(frames, k)]
        known = max(map(self.first_reading, remembering), default=self.begin - 1) + 1
        bounds = np.linspace(known, units, self.scans + 1).round().astype(int)
        bounds = np.unique([*range(self.begin, known), *bounds])
        return [(int(a), int(b)) for a, b in pairwise(bounds)]

    def remembered(self, frames: int, stage: int) -> int:
        """How many frames a stage has to remember in a video of so many, 0 for none."""
        units = self.layout.units(frames)
        if stage not in self.reuse or self.layout.history != layout.PYRAMID:
            return 0
        if self.window is not None and self.window < units - 1:
            return 0  # what a unit sees does not begin as before
        if self.first_reading(stage) > units - 2:
            return 0
        return 1 + (units - stage - 3) * self.layout.frames_per_unit

    def first_reading(self, stage: int) -> int:
        """The unit that reads frame 0 at stage 0 first, to be remembered by a stage."""
        return max(stage + 1, self.begin)

    def room(self, shape: tuple[int, int, int, int], stage: int) -> int:
        """How many video tokens that is, of latents (t, h, w, c), 0 for none.

        A history that is read once in a unit has room besides, as long as it lasts.
        """
        frames = self.remembered(shape[0], stage)
        if frames and self.clean_history:
            levels = sum(4**level for level in range(stage + 1))
            frames += self.layout.frames_per_unit * levels
        cells = shape[1] * shape[2] // 4 ** (len(self.stages) - 1)
        return frames * cells // self.layout.patch**2

    def reads_once(self, unit: Unit, stage: int) -> bool:
        """Whether only the first step of a stage reads the unit's history."""
        return self.clean_history and stage in self.reuse and unit.slots != 1

    def unit(
        self,
        index: int | Int[Array, ""],
        span: tuple[int, int],
        stage: int,
        frames: int,
    ) -> Unit:
        """A unit of a span of `spans`, as a stage reads it in a video of `frames`.

        It remembers after `first_reading`.
        """
        begin, end = span
        known = begin > self.first_reading(stage) and self.remembered(frames, stage) > 0
        size = self.layout.unit_size(begin == 0, frames)
        slots = end if self.window is None else min(end, 1 + self.window)
        return Unit(index, None if known else slots, size)


# --------------------------------------------------------------- the pieces of sampling
