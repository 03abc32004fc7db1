# SPDX-License-Identifier: Apache-2.0
"""What data sets that are drawn here have in common: shapes, and their folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool


def shape_inside(shape: str, side: int) -> Bool[np.ndarray, "side side"]:
    """Which points of a square grid are inside a shape that fills it."""
    x = (np.arange(side) + 0.5) * 2 / side - 1
    y = x[:, None]  # downwards
    radius = np.hypot(x, y)
    # A star is a kite between a tip at radius 1 and a notch, mirrored ten times.
    sector = np.pi / 5
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    notch = 0.42 * np.sin(sector), 0.42 * np.cos(sector)
    return {
        "circle": radius < 1,
        "square": np.maximum(abs(x), abs(y)) < 0.9,
        "triangle": (2 * abs(x) < y + 1) & (y < 0.9),
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
        "ring": (radius < 1) & (radius > 0.58),
        "star": (1 - notch[1]) * across < notch[0] * (1 - along),
    }[shape]


def is_drawn(folder: Path, dataset: dict[str, Any]) -> bool:
    """Whether a folder holds this very data set; else it is ready for its files.

    Args:
        dataset: JSON values that say what is drawn.

    Raises:
        ValueError: the folder holds anything else.
    """
    summary, expected = folder / "dataset.json", json.dumps(dataset)
    if folder.exists() and any(folder.iterdir()):
        content = summary.read_text() if summary.is_file() else "files of another kind"
        if content != expected:
            raise ValueError(
                f"{folder} holds {content}, expected {expected}; give another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    summary.write_text(expected)
    return (folder / "manifest.jsonl").is_file()
