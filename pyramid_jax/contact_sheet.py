# SPDX-License-Identifier: Apache-2.0
"""Videos as a picture: one row of frames each, with its prompt underneath."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure


def write_contact_sheet(
    path: str | Path,
    videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
    captions: Sequence[str],
    columns: int = 8,
) -> Path:
    """Writes a PNG with up to `columns` frames of every video and the captions below.

    Raises:
        ValueError: no video, or as many captions as not there are videos.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; give one for each"
        )
    count = min(columns, max(len(video) for video in videos))
    height, width = videos[0].shape[1:3]
    tall = 1.25 * height / width + 0.3
    figure = Figure(figsize=(1.25 * count, tall * len(videos)), dpi=120)
    axes = figure.subplots(len(videos), count, squeeze=False)
    for row, video, caption in zip(axes, videos, captions, strict=True):
        shown = (
            np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)
        )
        for axis in row:
            axis.axis("off")
        for axis, frame in zip(row, video[shown], strict=False):
            axis.imshow(frame, interpolation="nearest")
        row[0].text(
            0, 1.04, caption, transform=row[0].transAxes, fontsize=9, va="bottom"
        )
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, wspace=0.03, hspace=0.25)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
