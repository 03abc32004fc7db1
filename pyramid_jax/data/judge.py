# SPDX-License-Identifier: Apache-2.0
"""Says what a clip of the embedded data set's kind shows, to score generated clips.

The judge looks at the first and the last frame, for one compact object that is the same
in both. It learns shapes from clips that it draws itself, never from training data.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from pyramid_jax.data.embedded import BACKGROUND, COLOURS, DIRECTIONS, captions, render

# Lengths in pixels, colours and contrast of 255.
_SEED = 2024, 10, 8  # of the judge's own drawings; seeds of data sets have two parts
_DRAWN = 4  # drawings per caption
_NOISE = 20  # its deviation in these drawings
_VISIBLE = 70  # contrast with the background from which a pixel belongs to an object
_AREA = 25, 240  # of an object
_OFF_COLOUR = 110  # distance from which a colour is none of the palette
_TRAVEL = 7  # half the way of a real clip
_VIEW = 12  # side of the normalised picture of an object


class Verdict(NamedTuple):
    """What a clip shows; None for what can not be seen."""

    colour: str | None
    shape: str | None
    direction: str | None


def judge(clip: UInt8[np.ndarray, "f 32 32 3"]) -> Verdict:
    """The colour, shape and direction seen in a clip.

    Guessing scores 1/6, 1/6 and 1/4 at most; a clip without one clear object scores
    nothing. Needs scikit-learn, else raises ImportError.
    """
    first, last = _object(clip[0]), _object(clip[-1])
    if first is None or last is None:
        return Verdict(None, None, None)
    colour, colour_after = _colour(clip[0][first]), _colour(clip[-1][last])
    shape, shape_after = _classifier()([_view(first), _view(last)]).tolist()
    return Verdict(
        colour if colour == colour_after else None,
        shape if shape == shape_after else None,
        _direction(first, last),
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval (Wilson) of a rate of which `n` trials were seen.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(
            f"{successes} successes of {n}: expected 0 <= successes <= n > 0"
        )
    z = 1.959964
    centre = (successes + z * z / 2) / (n + z * z)
    spread = math.sqrt(successes * (n - successes) / n + z * z / 4) * z / (n + z * z)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _object(frame: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"] | None:
    """The largest connected object of a frame, None if it has no sensible size."""
    contrast = abs(frame.astype(int) - BACKGROUND).max(-1)
    found: Any = ndimage.label(contrast > _VISIBLE)
    labels, count = found
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + sizes.argmax() if _AREA[0] <= sizes.max() <= _AREA[1] else None


def _view(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "p"]:
    """The object's bounding square, stretched to _VIEW x _VIEW values from 0 to 1."""
    y, x = np.nonzero(mask)
    middle = (y.max() + y.min()) / 2, (x.max() + x.min()) / 2
    side = 1 + max(np.ptp(y), np.ptp(x))
    steps = ((np.arange(_VIEW) + 0.5) / _VIEW - 0.5) * side
    places = np.meshgrid(middle[0] + steps, middle[1] + steps, indexing="ij")
    view = ndimage.map_coordinates(mask.astype(np.float32), places, order=1)
    return rearrange(view, "h w -> (h w)")


def _colour(pixels: UInt8[np.ndarray, "n 3"]) -> str | None:
    """The palette's colour nearest to the median pixel, if any is near."""
    offsets = np.array(list(COLOURS.values())) - np.median(pixels, axis=0)
    distances = np.linalg.norm(offsets, axis=1)
    nearest = distances.argmin()
    return list(COLOURS)[nearest] if distances[nearest] < _OFF_COLOUR else None


def _direction(
    first: Bool[np.ndarray, "h w"], last: Bool[np.ndarray, "h w"]
) -> str | None:
    """Where the object's centre went, if far enough and more or less straight."""
    move = np.argwhere(last).mean(0) - np.argwhere(first).mean(0)
    for name, unit in DIRECTIONS.items():
        along = move @ unit
        across = np.linalg.norm(move - along * np.array(unit))
        if along >= max(_TRAVEL, 2 * across):
            return name
    return None


@functools.cache
def _classifier() -> Callable[[list[np.ndarray]], np.ndarray]:
    """Names the shapes of views; learnt in about a second from drawn, noisy frames."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "the judge needs scikit-learn; run pip install 'pyramid_jax[demo]'"
        ) from error
    rng, views, names = np.random.default_rng(_SEED), [], []
    for caption in captions() * _DRAWN:
        drawn = 1.0 * render(caption, rng)[0]
        frame = reduce(drawn, "(h i) (w j) c -> h w c", "mean", i=4, j=4)
        noisy = np.clip(frame + rng.normal(0, _NOISE, frame.shape), 0, 255)
        if (mask := _object(noisy.astype(np.uint8))) is not None:
            views.append(_view(mask))
            names.append(caption.shape)
    return SVC(C=10).fit(views, names).predict
