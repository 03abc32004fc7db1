# SPDX-License-Identifier: Apache-2.0
"""A VAE made wider without a change of what it computes.

Every channel becomes several equal ones, and whoever reads it gives each a share of the
weight that it gave to the one. The shares are drawn, so that equal channels have unlike
gradients and part ways as soon as training goes on.

Source: Net2Net, arXiv:1511.05641, section 2.1.
"""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SEED = 0
CONCENTRATION = 8.0  # of the drawn shares; large: all nearly the same


def widened(params: Any, like: Any) -> Any:
    """The weights of a narrow VAE as those of a wide one, which computes the same.

    Args:
        params: the weights of the narrow one.
        like: arrays, or their shapes, of the wide one, as `initialise_vae` makes them.

    Raises:
        ValueError: the networks differ in more than widths, or a width is no multiple
            of the narrow one's.
    """
    narrow: dict[str, Any] = flatten_dict(params, sep="/")
    wide: dict[str, Any] = flatten_dict(like, sep="/")
    if odd := narrow.keys() ^ wide.keys():
        raise ValueError(
            "a VAE can be made wider, but not deeper or of another kind: only one of "
            f"the two has {min(odd)}"
        )
    rng = np.random.default_rng(SEED)
    result = {
        name: _widened(name, np.asarray(narrow[name]), wide[name].shape, rng)
        for name in sorted(narrow)
    }
    return unflatten_dict(result, sep="/")


def _widened(
    name: str, x: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """One array with channels, its last axis, and the inputs before them repeated."""
    times = [new // old for new, old in zip(shape, x.shape, strict=True)]
    if any(old * n != new for old, n, new in zip(x.shape, times, shape, strict=True)):
        raise ValueError(
            f"{name} can't grow from {x.shape} to {shape}: make every width a whole "
            "multiple of the VAE's that the run starts from"
        )
    for axis, n in enumerate(times):
        x = np.repeat(x, n, axis)
    if x.ndim > 1 and (copies := times[-2]) > 1:
        inputs, outputs = x.shape[-2] // copies, x.shape[-1]
        shares = rng.dirichlet([CONCENTRATION] * copies, (inputs, outputs))
        x = x * shares.swapaxes(1, 2).reshape(inputs * copies, outputs)
    if "/attention/query/" in name:  # longer sums, divided by the root of the width
        x = x * times[-1] ** -0.5
    return x.astype(np.float32)
