# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Pallas kernels, looked up by device, heads and length.

The table is data, `assets/attention_tiles.json`, which `benchmarks/tune_attention.py`
writes. An entry says which heads and rows it is for and where it comes from: the
registers and spills that the compilers report (docs/kernels.md), or measured times.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TABLE = Path(__file__).parents[1] / "assets" / "attention_tiles.json"
TILED = ("pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")  # backends that have tiles
SMALLEST = 16
Sizes = Sequence[Sequence[int]]


class Tile(NamedTuple):
    """Tokens in a block of queries and of keys; warps and loads in flight of a program.

    A TPU ignores the latter two. Of the keys in a wholly visible block, so many as
    `polynomial` says are weighed by a polynomial, in the forward pass on a Hopper GPU.
    """

    query: int
    key: int
    warps: int = 4
    stages: int = 2
    polynomial: int = 0


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    query: Tile  # backward, queries own: dq
    key: Tile  # backward, keys own: dk, dv

    @classmethod
    def of(cls, sizes: Sizes) -> "Tiles":
        """Tiles from plain numbers, as configs and the table hold them.

        Args:
            sizes: one tile for all kernels or one for each of forward, dq, and dk with
                dv; a tile is (queries, keys, warps, stages, keys by polynomial), of
                which the last three may be left out from the right.

        Raises:
            ValueError: another number of tiles, or sizes that no kernel takes.
        """
        if len(sizes) not in (1, 3) or any(not 2 <= len(size) <= 5 for size in sizes):
            raise ValueError(
                f"attention tiles {sizes} must be one tile or three, each (queries, "
                "keys) and, if wanted, warps, stages and keys by polynomial"
            )
        for size in sizes:
            query, key, warps, stages, polynomial = Tile(*size)
            powers = all(n > 0 and n & (n - 1) == 0 for n in (query, key, warps))
            if not powers or min(query, key) < SMALLEST or stages < 1:
                raise ValueError(
                    f"attention tile {tuple(size)} must have blocks of {SMALLEST}, 32, "
                    "64, ... tokens, 1, 2, 4 or 8 warps, and a stage or more"
                )
            if polynomial not in range(0, key, 8):
                raise ValueError(
                    f"{polynomial} keys by polynomial must be 0, 8, 16, ... and fewer "
                    f"than the {key} keys of a block"
                )
        return cls(*(Tile(*size) for size in (*sizes, *sizes, *sizes)[:3]))


@dataclass(frozen=True)
class Entry:
    """An entry of the table; no two are for the same calls.

    Args:
        backend: one of `TILED`.
        device: what the device's name begins with, "" for any.
        dtype: "bfloat16" for all types of two bytes, "float32" for those of four.
        dim: width of the widest heads that it is for.
        length: tokens of the longest rows that it is for; None: any.
        source: where the tiles come from.
    """

    backend: str
    device: str
    dtype: str
    dim: int
    length: int | None
    tiles: Tiles
    source: str

    @property
    def narrowness(self) -> tuple[float, ...]:
        """Larger for less: first by device, then by width, then by length."""
        length = float("inf") if self.length is None else self.length
        return len(self.device), -self.dim, -length


def tiles_for(
    backend: str, dim: int, dtype: Any, length: int, device: str | None = None
) -> Tiles:
    """The tiles of the table for heads of width `dim` in rows of `length` tokens.

    Args:
        device: its name in JAX, e.g. "NVIDIA H200"; None: the first device.

    Raises:
        ValueError: the table has no entry for them.
    """
    device = jax.devices()[0].device_kind if device is None else device
    dtype = "float32" if jnp.dtype(dtype).itemsize >= 4 else "bfloat16"
    fitting = [
        entry
        for entry in read_tiles(TABLE)
        if (entry.backend, entry.dtype) == (backend, dtype)
        and device.startswith(entry.device)
        and dim <= entry.dim
        and (entry.length is None or length <= entry.length)
    ]
    if not fitting:
        raise ValueError(
            f"{TABLE} has no attention tiles for {backend}, {dtype}, heads of width "
            f"{dim}; give tiles, or use the backend 'xla'"
        )
    return max(fitting, key=lambda entry: entry.narrowness).tiles


@functools.cache
def read_tiles(path: Path) -> tuple[Entry, ...]:
    """The entries of a table."""
    lines = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Entry(**line | {"tiles": Tiles.of(line["tiles"])}) for line in lines)
