# SPDX-License-Identifier: Apache-2.0
"""What the released models take, as docs/memory.md says it."""

import pytest

from launch.memory import released_networks
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import GIB, ModelParts, Work

SHAPES = {"384p": (16, 48, 80, 16), "768p": (31, 96, 160, 16)}


def largest(networks: ModelParts, size: str, most: float | None = None) -> float:
    """GiB of the largest phase, decoded in the pieces that fit."""
    work = Work(SHAPES[size], 1, SampleConfig())
    work = work._replace(pieces=memory.pieces(networks, work, None, most))
    return memory.plan(networks, work).largest.total / GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "resident", "parked"),
    [("mmdit", (22.5, 45.7), (10.5, 31.3)), ("miniflux", (21.1, 44.3), (9.2, 31.3))],
)
def test_released_models_take_what_the_documents_say(
    variant: str, resident: tuple[float, float], parked: tuple[float, float]
):
    for wait, said in ((False, resident), (True, parked)):
        networks = released_networks(variant, parked=wait)
        found = [largest(networks, size) for size in SHAPES]
        assert found == pytest.approx(said, abs=0.05)


@pytest.mark.slow
def test_ten_seconds_of_768p_fit_twelve_gib_if_parts_take_turns():
    networks = released_networks("mmdit", parked=True)
    assert largest(networks, "768p", 12 * GIB) < 12
