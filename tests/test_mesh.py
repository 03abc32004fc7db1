# SPDX-License-Identifier: Apache-2.0
"""Meshes follow the network between devices, which are descriptions here."""

from dataclasses import dataclass

import numpy as np
import pytest

from launch.compile.machines import hops
from pyramid_jax.sharding import arranged


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def torus(*size: int, slice_index: int = 0) -> list[Chip]:
    places = [tuple(map(int, at[::-1])) for at in np.ndindex(*size[::-1])]
    return [Chip(i, place, slice_index) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, 16, 1, 1), [1, 1.25]),
        ((8, 8, 1, 1), [1.5, 1.5]),
        ((1, 64, 1, 1), [0, 1.31]),
    ],
)
def test_rings_of_a_v5p_4x4x4_have_short_ways(sizes, expected):
    chips = torus(4, 4, 4)
    assert hops(arranged(chips, sizes))[:2] == pytest.approx(expected, abs=0.01)
    if sizes == (8, 8, 1, 1):  # devices in their order are farther apart
        assert hops(np.array(chips).reshape(sizes))[0] == 2.5


def test_data_leads_from_slice_to_slice():
    chips = torus(2, 2, 2, slice_index=1) + torus(2, 2, 2)
    grid = arranged(chips, (4, 4, 1, 1))
    assert [{chip.slice_index for chip in row.flat} for row in grid] == [
        {0}, {0}, {1}, {1}
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2 slices.*it is 1, make it a multiple of 2"):
        arranged(chips, (1, 16, 1, 1))


def test_what_the_network_does_not_allow_keeps_its_order(caplog):
    part = torus(4, 4, 4)[:6]  # no box
    grid = arranged(part, (2, 3, 1, 1))
    assert [chip.id for chip in grid.flat] == list(range(6))
    assert "does not follow the network" in caplog.text
