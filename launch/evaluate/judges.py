# SPDX-License-Identifier: Apache-2.0
"""Who says what clips of the embedded models show: a judge for each drawn data set."""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from launch import moving_shapes
from launch.evaluate.metrics import Clip
from launch.pairs.dataset import pair
from launch.pairs.judge import clip_features, judge_pair
from launch.pairs.scene import Settings


class Asked(NamedTuple):
    """A caption, what a clip of it must show, and a real clip that does."""

    text: str
    expected: Any
    real: Clip


class Judge(NamedTuple):
    """How a data set is asked for and judged.

    Attributes:
        frames: of a clip that is judged; longer ones are judged in windows.
        ask: makes so many `Asked` from a seed, a number of frames, and whether clips
            are wide.
        see: what a clip shows.
        right: of what is seen and expected, what is right, by name.
        motion: that of them which images do not have.
        features: of clips, for Fréchet distances, if there are any.
    """

    frames: int
    ask: Callable[[int, int, int, bool], list[Asked]]
    see: Callable[[Clip], Any]
    right: Callable[[Any, Any], dict[str, bool]]
    motion: str
    features: Callable[[Sequence[Clip]], np.ndarray] | None = None


def ask_shapes(count: int, seed: int, frames: int, wide: bool) -> list[Asked]:
    """Captions in random order, all before any comes twice; clips of 8 frames."""
    captions = moving_shapes.captions()
    order = np.random.default_rng(seed).permutation(len(captions))
    asked = []
    for i in range(count):
        caption = captions[order[i % len(order)]]
        rng = np.random.default_rng((7, i, seed))  # none of the training data
        clip = moving_shapes.small(moving_shapes.render(caption, rng))
        asked.append(Asked(caption.text, caption, clip))
    return asked


def right_shapes(seen: moving_shapes.Verdict, expected: Any) -> dict[str, bool]:
    """Whether shape, colour and direction are those of the caption."""
    names = ("shape", "colour", "direction")
    return {name: getattr(seen, name) == getattr(expected, name) for name in names}


def ask_pairs(count: int, seed: int, frames: int, wide: bool) -> list[Asked]:
    """Held-out bouncing pairs, images if they have one frame."""
    kind = "image" if frames == 1 else "video"
    asked, number = [], 0
    while len(asked) < count:
        each = pair(number, seed, "held out", Settings(frames), kind)
        number += 1
        if (each.pixels.shape[2] > each.pixels.shape[1]) == wide:
            asked.append(Asked(each.text, each.actors, each.pixels))
    return asked


JUDGES = MappingProxyType(
    {
        "shapes": Judge(
            8, ask_shapes, moving_shapes.judge, right_shapes, motion="direction"
        ),
        "pairs": Judge(
            17,
            ask_pairs,
            judge_pair,
            lambda seen, expected: seen.right(expected),
            motion="motions",
            features=clip_features,
        ),
    }
)
