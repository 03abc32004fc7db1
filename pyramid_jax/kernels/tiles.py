# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the GPU kernels.

Chosen from the registers and spills that the compilers report (docs/kernels.md), not
yet from measured times.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Tile:
    """Tokens in a block of queries and of keys; warps and loads in flight of a program.

    Sizes are powers of two, 16 or more.
    """

    query: int
    key: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    query: Tile  # backward, queries own: dq
    key: Tile  # backward, keys own: dk, dv


def tiles_for(dim: int, dtype: Any) -> Tiles:
    """The largest tiles that keep an A100's registers, as its compiler reports them.

    Float32 products run outside the tensor cores, unrolled: small tiles compile faster.
    """
    if dtype == jnp.float32:
        short = 32 if dim <= 64 else 16
        return Tiles(Tile(32, short), Tile(32, short), Tile(short, 32))
    if dim > 64:
        return Tiles(Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 64, 8))
    return Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8), Tile(64, 128, 8))
