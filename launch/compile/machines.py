# SPDX-License-Identifier: Apache-2.0
"""The machines that a step is compiled for: devices, what they hold, how fast they are.

`v5p:4x4x4` is a TPU slice by its topology, `2*v5p:4x4x4` two of them, `h200x8` one host
of GPUs, `cpu` whatever this process has. The numbers are the makers': none was measured
here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from launch.compile.chips import A100, CHIPS, GPU, H200, compilers
from pyramid_jax.flops import PEAKS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A device, by its data sheet.

    Args:
        memory: bytes, of which a program may use `USABLE`.
        peak: bfloat16 operations per second.
        bandwidth: bytes per second between memory and chip.
        link: bytes per second that a device sends in one direction: over NVLink, or
            over the two ways of a ring along one axis of the torus.
        axes: of the torus; 1: every device reaches every other one as fast.
        clock: cycles per second.
        unit: width of a matrix unit, into which heads of 64 are put alone.
    """

    memory: float
    peak: float
    bandwidth: float
    link: float
    axes: int = 1
    clock: float = 0.0
    unit: int = 64


USABLE = 0.92  # of a memory: the rest is the runtime's, and lost between arrays
SHEETS = {
    "v5e": Chip(16 * GIB, PEAKS["TPU v5e"], 819e9, 90e9, 2, 1.5e9, 128),
    "v5p": Chip(95 * GIB, PEAKS["TPU v5"], 2765e9, 180e9, 3, 1.75e9, 128),
    "v6e": Chip(32 * GIB, PEAKS["TPU v6"], 1640e9, 180e9, 2, 1.75e9, 256),
    "a100": Chip(A100.memory, PEAKS["NVIDIA A100"], A100.bandwidth, 300e9),
    "h200": Chip(H200.memory, PEAKS["NVIDIA H200"], H200.bandwidth, 450e9),
    "cpu": Chip(16 * GIB, 1e11, 20e9, 5e9),
}


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, with the compiler's platform and the attention for them."""

    name: str
    chip: Chip
    platform: str
    devices: tuple[Any, ...]

    @property
    def backend(self) -> str:
        """The attention that is compiled; loops of a CPU's "blocks" have no counts."""
        names = {"tpu": "pallas_tpu", "cuda": "pallas_triton", "cpu": "xla"}
        return names[self.platform]


def machine(name: str) -> Machine:
    """The machine of a name; its devices hold no arrays and run nothing.

    Raises:
        ValueError: the name is none, there is no such slice, or its compiler is not
            installed.
    """
    if name == "cpu":
        return Machine(name, SHEETS["cpu"], "cpu", tuple(jax.devices("cpu")))
    if found := re.fullmatch(r"(?:(\d+)\*)?(v5e|v5p|v6e):(\d+(?:x\d+)+)", name):
        slices = {"num_slices": int(found[1])} if found[1] else {}
        _check_sides(found[2], found[3])
        with compilers():
            shape = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{found[2]}:{found[3]}", **slices
            )
        return Machine(name, SHEETS[found[2]], "tpu", tuple(shape.devices))
    if found := re.fullmatch(r"(a100|h200)x(\d+)", name):
        gpu = CHIPS[found[1]]
        assert isinstance(gpu, GPU)
        devices = tuple(gpu.devices(int(found[2])))
        return Machine(name, SHEETS[found[1]], "cuda", devices)
    raise ValueError(
        f"no machine {name!r}; name a TPU slice (v5e:2x4, v5p:4x4x4, v6e:16x16, "
        "2*v5p:4x4x4), GPUs of a host (a100x8, h200x8), or cpu"
    )


def _check_sides(chip: str, topology: str) -> None:
    """perf: the compiler takes more than a minute to refuse a slice that there isn't.

    Raises:
        ValueError: no slice of these chips has such sides.
    """
    sides, axes = [int(side) for side in topology.split("x")], SHEETS[chip].axes
    known = (side in {1, 2} or (side > 0 and side % 4 == 0) for side in sides)
    if len(sides) != axes or not all(known):
        raise ValueError(
            f"no slice of {chip} is {topology}; give {axes} sides, each of 1, 2, or a "
            f"multiple of 4, such as {'x'.join(['4'] * axes)}"
        )


def hops(grid: np.ndarray) -> list[float]:
    """Along each axis of a mesh, the links between neighbours on its ring, on mean.

    Args:
        grid: TPUs, which have coordinates in a torus.
    """
    place = _places(grid.ravel()).reshape(*grid.shape, -1)
    size = place.max(axis=tuple(range(grid.ndim))) + 1
    found = []
    for axis in range(grid.ndim):
        way = np.abs(np.roll(place, -1, axis) - place)
        found.append(float(np.minimum(way, size - way).sum(axis=-1).mean()))
    return found


def spanned(devices: Sequence[Any]) -> int:
    """How many axes of the torus these devices lie along, at least 1."""
    if not hasattr(devices[0], "coords"):
        return 1
    places = _places(devices)
    return max(1, int((places != places[0]).any(axis=0).sum()))


def _places(devices: Any) -> np.ndarray:
    return np.array([device.coords for device in devices])
