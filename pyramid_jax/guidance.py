# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: how far a video is pushed to its prompt, unit by unit."""

from dataclasses import dataclass

import numpy as np

MOST_GUIDANCE = 100.0  # videos are noise long before


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = negative + scale · (positive - negative).

    Args:
        first, video: scale for the first frame and for later units.
        decay: if given, unit u uses max(first - decay·u, floor) for both instead.

    Raises:
        ValueError: a number below 0 or above `MOST_GUIDANCE`, or none at all (NaN).
    """

    first: float = 7.0
    video: float = 5.0
    decay: float | None = None
    floor: float = 2.0

    def __post_init__(self):
        for name in ("first", "video", "decay", "floor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_GUIDANCE:
                raise ValueError(
                    f"guidance {name}={value} must be 0 to {MOST_GUIDANCE:g}"
                )

    def scales(self, units: int) -> np.ndarray:
        """The scale of every unit."""
        if self.decay is not None:
            return np.maximum(self.first - self.decay * np.arange(units), self.floor)
        return np.array([self.first] + [self.video] * (units - 1), np.float64)
