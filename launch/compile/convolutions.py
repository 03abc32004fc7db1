# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a convolution in a compiled program is.

A call of cuDNN for a gradient is told the axes and the window of the convolution whose
gradient it makes, and reads and writes that one's arrays in another order.
"""

import re
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


def convolution_flops(said: str, shapes: Sequence[Shape]) -> float:
    """Additions and multiplications of a convolution, those with padding left out.

    Args:
        said: what the program says of it behind its operands.
        shapes: of its two operands, and of its result.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", said)
    if labels is None or len(shapes) < 3:
        return 0
    left, right, out = (
        dict(zip(axes, shape, strict=True))
        for axes, shape in zip(labels.groups(), _forward(said, shapes), strict=True)
    )
    groups = re.search(r"batch_group_count=(\d+)", said)
    total = 2 * left["b"] * right["o"] * right["i"] / int(groups[1] if groups else 1)
    told = "".join(re.findall(r"window=\{([^}]*)\}", said))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", told))
    for axis in (label for label in out if label.isdigit()):
        one_axis = {k: v.split("x")[int(axis)] for k, v in window.items()}
        total *= _meetings(left[axis], right[axis], out[axis], one_axis)
    return total


def _forward(said: str, shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    """The shapes of input, kernel and output of the convolution that is described."""
    first, second, result = shapes
    if "__cudnn$convBackwardInput" in said:
        return result, second, first
    if "__cudnn$convBackwardFilter" in said:
        return first, result, second
    return first, second, result


def _meetings(cells: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """In how many places along an axis a kernel's cell meets no padding."""
    stride, apart = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    spread, low = int(window.get("lhs_dilate", 1)), window.get("pad", "0").split("_")[0]
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * apart - int(low)
    inner = (at >= 0) & (at <= (cells - 1) * spread) & (at % spread == 0)
    return int(inner.sum())
