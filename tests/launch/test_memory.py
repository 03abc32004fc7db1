# SPDX-License-Identifier: Apache-2.0
"""What the released models take, as docs/memory.md says it."""

import pytest

from launch.memory import released_parts
from pyramid_jax.model import SampleConfig
from pyramid_jax.pipeline.memory import (
    GIB,
    ModelParts,
    Work,
    decoding_pieces,
    memory_plan,
)

SHAPES = {"384p": (16, 48, 80, 16), "768p": (31, 96, 160, 16)}


def largest(parts: ModelParts, size: str, limit: float | None = None) -> float:
    """GiB of the largest phase, decoded in the pieces that fit."""
    work = Work(SHAPES[size], 1, SampleConfig())
    work = work._replace(pieces=decoding_pieces(parts, work, None, limit))
    return memory_plan(parts, work).largest.total / GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "resident", "parked"),
    [("mmdit", (22.5, 45.7), (10.5, 31.3)), ("miniflux", (21.1, 44.3), (9.2, 31.3))],
)
def test_released_models_take_what_the_documents_say(
    variant: str, resident: tuple[float, float], parked: tuple[float, float]
):
    for wait, said in ((False, resident), (True, parked)):
        parts = released_parts(variant, parked=wait)
        totals = [largest(parts, size) for size in SHAPES]
        assert totals == pytest.approx(said, abs=0.05)


@pytest.mark.slow
def test_ten_seconds_of_768p_fit_twelve_gib_if_parts_take_turns():
    parts = released_parts("mmdit", parked=True)
    assert largest(parts, "768p", 12 * GIB) < 12
