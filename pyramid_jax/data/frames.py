# SPDX-License-Identifier: Apache-2.0
"""A decoded frame of a video as players show it: upright, in proportion, opaque.

Files store how a frame is turned and mirrored (its display matrix), how wide its pixels
are (the sample aspect ratio) and what its numbers mean (matrix, range, transfer curve).
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import (
    ColorPrimaries,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from jaxtyping import UInt8
from PIL import Image

from pyramid_jax.data.pixels import HeightWidth, over_white

# Without these, libswscale darkens every colour by 2 to 3 of 255 on its way to a file.
EXACT = (
    Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)
# ITU-T H.273 code points of matrices.
BT709 = 1
_UNSPECIFIED, _BT601 = 2, 6
_LINES = 720  # from here on, players take videos that do not say it to be BT.709
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
_TO_BT709 = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)


class _Turn(NamedTuple):
    """How a stored picture becomes upright: exchange axes, then take these steps."""

    transposed: bool
    rows: int
    columns: int


def shown_size(frame: VideoFrame, aspect: Fraction | None) -> HeightWidth:
    """Height and width of a frame on the screen.

    Args:
        aspect: width of a stored pixel as a multiple of its height; None is 1.

    Raises:
        ValueError: the frame is turned by another angle than a multiple of 90 degrees.
    """
    height, width = frame.height, max(1, round(frame.width * (aspect or 1)))
    return (width, height) if _turn(frame).transposed else (height, width)


class FrameConverter:
    """Makes pixels of the frames of one video, scaled to cover a size and cropped.

    Args:
        size: height and width in pixels.
        aspect: as in `shown_size`.
    """

    def __init__(self, size: HeightWidth, aspect: Fraction | None):
        self._size, self._aspect = size, float(aspect or 1)
        self._scaler = VideoReformatter()  # perf: keeps its tables, 4 times faster

    def pixels(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """A frame as players show it.

        Raises:
            ValueError: an angle as in `shown_size`, or HDR, which 8 bits can't show.
        """
        turn = _turn(frame)
        height, width = self._size
        if turn.transposed:
            height, width = width, height
        shown = frame.width * self._aspect
        scale = max(height / frame.height, width / shown)
        tall = max(height, round(frame.height * scale))
        wide = max(width, round(shown * scale))
        method = (Interpolation.AREA if scale < 1 else Interpolation.BICUBIC) | EXACT
        scaled = self._scaler.reformat(
            self._standard(frame), wide, tall, "rgb24", interpolation=method
        )
        top, left = (tall - height) // 2, (wide - width) // 2
        cropped = scaled.to_ndarray()[top : top + height, left : left + width]
        upright = cropped.swapaxes(0, 1) if turn.transposed else cropped
        return np.ascontiguousarray(upright[:: turn.rows, :: turn.columns])

    def _standard(self, frame: VideoFrame) -> VideoFrame:
        """An opaque frame whose matrix is known."""
        if frame.color_trc in _HDR or frame.color_primaries == ColorPrimaries.BT2020:
            raise ValueError(
                "has colours of HDR or BT.2020, expected BT.709 or sRGB; convert it "
                f"with ffmpeg -i INPUT -vf {_TO_BT709} OUTPUT.mp4"
            )
        if frame.colorspace == _UNSPECIFIED:
            frame.colorspace = BT709 if frame.height >= _LINES else _BT601
        alpha = any(component.is_alpha for component in frame.format.components)
        if alpha or frame.format.has_palette:
            image = Image.fromarray(frame.to_ndarray(format="rgba"))
            return VideoFrame.from_image(over_white(image))
        return frame


def _turn(frame: VideoFrame) -> _Turn:
    """What the display matrix of a frame says.

    Its rows are where one step to the right and one step down in the stored picture
    lead on the screen, to the right and down.
    """
    matrix = _display_matrix(frame)
    lengths = np.hypot(matrix[:, :1], matrix[:, 1:])
    if not lengths.all():  # written by mistake; players ignore it
        return _Turn(False, 1, 1)
    unit = matrix / lengths
    axes = np.rint(unit).astype(int)
    if np.abs(unit - axes).max() > 0.02 or not axes.any(axis=0).all():
        raise ValueError(
            f"is to be shown turned by {-frame.rotation} degrees, expected a multiple "
            "of 90; turn it with ffmpeg -i INPUT OUTPUT.mp4"
        )
    columns, rows = (int(step) for step in axes.sum(axis=0))
    return _Turn(bool(axes[0, 1]), rows, columns)


def _display_matrix(frame: VideoFrame) -> np.ndarray:
    try:
        stored = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV lacks a name for other data beside the frame
        angle = np.deg2rad(-frame.rotation)
        across, down = np.cos(angle), np.sin(angle)
        return np.array([[across, down], [-down, across]])
    if stored is None:
        return np.eye(2)
    return np.frombuffer(stored, np.int32).reshape(3, 3)[:2, :2] / 2**16
