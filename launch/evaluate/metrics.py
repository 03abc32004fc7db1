# SPDX-License-Identifier: Apache-2.0
"""How one clip looks and moves, and what changes from its beginning to its end.

Nothing is learnt and nothing is downloaded: pixels are compared, and optical flow is
that of OpenCV (DIS), which is at least 20 times faster than scikit-image's.
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

Clip = UInt8[np.ndarray, "_ _ _ 3"]
Flows = Sequence[Float[np.ndarray, "_ _ 2"]]

END = 0.15  # of a clip, for drift
RATE = 8.0  # frames per second at which a clip counts as moving
SIDE = 256  # pixels; the shorter side of frames for flow is at most this

_STEP = 6 / 256  # of the shorter side, which a moving frame's fastest part covers
_FASTEST, _SHARE = 0.05, 0.25  # that part, and the share of moving frames
_SMALLEST = 12  # pixels of a side, for optical flow
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue


class Look(NamedTuple):
    """How frames look, in values of 255.

    Sharpness is the mean slope of brightness per pixel, contrast its deviation,
    saturation the mean distance of the largest from the smallest colour.
    """

    sharpness: float
    contrast: float
    saturation: float
    colour: tuple[float, float, float]


class ClipMetrics(NamedTuple):
    """What is measured of one clip.

    Attributes:
        flicker: VBench's temporal flickering, 1 for a still clip.
        smoothness: how well frames follow from their two neighbours, at most 1.
        dynamic: 1 if something moves fast enough, else 0.
        flow: mean speed in shorter sides of a frame per second.
        sharpness, contrast, saturation: as in `Look`.
        sharpness_drift, contrast_drift, saturation_drift, flow_drift, colour_drift:
            differences of the first and the last 15 % of the clip.
    """

    flicker: float
    smoothness: float
    dynamic: float
    flow: float
    sharpness: float
    contrast: float
    saturation: float
    sharpness_drift: float
    contrast_drift: float
    saturation_drift: float
    flow_drift: float
    colour_drift: float


def measure(clip: Clip, fps: float) -> ClipMetrics:
    """All metrics of a clip of three frames or more.

    Raises:
        ValueError: a shorter or smaller clip, or no positive rate.
        ImportError: OpenCV is not installed.
    """
    frames, height, width, _ = clip.shape
    if frames < 3 or min(height, width) < _SMALLEST or fps <= 0:
        raise ValueError(
            f"{frames} frames of {height}x{width} pixels at {fps:g} per second; a clip "
            f"that is measured has 3 frames or more of at least {_SMALLEST} pixels"
        )
    small, step = brightness(clip), max(1, round(fps / RATE))
    flows = flows_of(small)
    slow = flows if step == 1 else flows_of(small[::step])
    speed = np.array([mean_speed(flow) for flow in flows]) * fps
    whole = look(clip)
    before, after = (look(clip[part]) for part in ends(len(clip)))
    early, late = (float(speed[part].mean()) for part in ends(len(speed)))
    return ClipMetrics(
        flicker=flicker(clip),
        smoothness=motion_smoothness(clip),
        dynamic=float(is_dynamic(slow)),
        flow=float(speed.mean()),
        sharpness=whole.sharpness,
        contrast=whole.contrast,
        saturation=whole.saturation,
        sharpness_drift=abs(before.sharpness - after.sharpness),
        contrast_drift=abs(before.contrast - after.contrast),
        saturation_drift=abs(before.saturation - after.saturation),
        flow_drift=abs(early - late),
        colour_drift=math.dist(before.colour, after.colour),
    )


def flicker(clip: Clip) -> float:
    """VBench's temporal flickering: 1 - (mean difference of neighbouring frames) / 255.

    Equal to VBench's on the pixels that the same version of OpenCV reads.
    """
    frames = (frame.astype(np.int16) for frame in clip)
    changes = [abs(a - b).mean() for a, b in pairwise(frames)]
    return float(1 - np.mean(changes) / 255)


def motion_smoothness(clip: Clip) -> float:
    """How well each frame is the middle of its neighbours along the flow between them.

    1 - (mean difference of frame and middle) / 255, over all but the first and the last
    frame. VBench's dimension of that name asks a network for the middle.
    """
    small = brightness(clip)
    errors = []
    for before, frame, after in zip(small, small[1:], small[2:], strict=False):
        middle = _middle(before, after)
        errors.append(abs(middle - frame).mean())
    return float(1 - np.mean(errors) / 255)


def is_dynamic(flows: Flows) -> bool:
    """Whether something moves, from flows at about 8 frames per second.

    The rule is VBench's, the flow another one: the fastest 5 % of a frame move by more
    than 6/256 of its shorter side, in a quarter of all frames.
    """
    limit = _STEP * min(flows[0].shape[:2])
    moving = sum(_fastest(flow) > limit for flow in flows)
    return moving >= max(1, round(_SHARE * (len(flows) + 1)))


def look(frames: Clip) -> Look:
    """How frames look on average."""
    rows = []
    for frame in frames:
        luma = frame @ _LUMA
        slope = np.hypot(*np.gradient(luma)).mean()
        spread = frame.max(axis=-1) - frame.min(axis=-1)
        rows.append([slope, luma.std(), spread.mean(), *frame.mean(axis=(0, 1))])
    means = [float(mean) for mean in np.mean(rows, axis=0)]
    sharpness, contrast, saturation, red, green, blue = means
    return Look(sharpness, contrast, saturation, (red, green, blue))


def ends(count: int) -> tuple[slice, slice]:
    """The first and the last 15 % of so many frames, at least one."""
    part = max(1, math.floor(END * count + 0.5))
    return slice(0, part), slice(count - part, count)


def spectrum(clip: Clip, bins: int = 16) -> Float[np.ndarray, "bins"]:
    """The power of brightness in decibels by radial frequency, a mean over frames.

    Frequencies from 0 to 1/2 per pixel fall into bins of equal width.
    """
    height, width = clip.shape[1:3]
    window = np.hanning(height)[:, None] * np.hanning(width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    place = np.floor(radius * 2 * bins).astype(int)
    inside = place < bins
    counts = np.bincount(place[inside], minlength=bins)
    power = np.zeros(bins)
    for frame in clip:
        luma = frame @ _LUMA
        values = abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
        power += np.bincount(place[inside], values[inside], bins)
    mean = power / np.maximum(counts, 1) / len(clip) / (window**2).sum()
    return 10 * np.log10(mean + 1e-3)  # below that is what rounding to 8 bits leaves


# ------------------------------------------------------------------------------- flow


def brightness(clip: Clip) -> UInt8[np.ndarray, "f y x"]:
    """Frames in grey, shrunk until their shorter side has at most `SIDE` pixels."""
    cv2 = opencv()
    height, width = clip.shape[1:3]
    scale = min(1.0, SIDE / min(height, width))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    return resized(np.stack(grey), round(height * scale), round(width * scale))


def resized(frames: UInt8[np.ndarray, "f ..."], height: int, width: int) -> np.ndarray:
    """Frames in another size; those that shrink are averaged."""
    cv2, size = opencv(), (width, height)
    shrinks = height < frames.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.stack([cv2.resize(frame, size, interpolation=method) for frame in frames])


def flows_of(small: UInt8[np.ndarray, "f y x"]) -> Flows:
    """The optical flow from every frame to the next."""
    return [optical_flow(a, b) for a, b in pairwise(small)]


def optical_flow(
    before: UInt8[np.ndarray, "y x"], after: UInt8[np.ndarray, "y x"]
) -> Float[np.ndarray, "y x 2"]:
    """Where every pixel goes, in pixels to the right and down."""
    cv2 = opencv()
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return method.calc(before, after, None)


def mean_speed(flow: Float[np.ndarray, "y x 2"]) -> float:
    """The mean length of a flow as a multiple of the frame's shorter side."""
    return float(np.hypot(*flow.T).mean() / min(flow.shape[:2]))


def _fastest(flow: Float[np.ndarray, "y x 2"]) -> float:
    """The mean length of the longest 5 % of a flow, in pixels."""
    lengths = np.sort(np.hypot(*flow.T), axis=None)
    return float(lengths[-max(1, int(_FASTEST * lengths.size)) :].mean())


def _middle(
    before: UInt8[np.ndarray, "y x"], after: UInt8[np.ndarray, "y x"]
) -> Float[np.ndarray, "y x"]:
    """The frame between two: each taken half the way along its flow to the other."""
    halves: list[Any] = []
    y, x = np.indices(before.shape, np.float32)
    for one, other in ((before, after), (after, before)):
        # Flow belongs to where a pixel begins; half the way it is nearly the same.
        flow = optical_flow(one, other) / 2
        places = [y - flow[..., 1], x - flow[..., 0]]
        pixels = one.astype(np.float32)
        halves.append(ndimage.map_coordinates(pixels, places, order=1, mode="nearest"))
    return (halves[0] + halves[1]) / 2


@functools.cache
def opencv() -> Any:
    """The library OpenCV.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "optical flow needs OpenCV; run pip install 'pyramid_jax[evaluate]'"
        ) from error
    return cv2
