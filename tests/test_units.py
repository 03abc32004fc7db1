# SPDX-License-Identifier: Apache-2.0
"""Which units a plan samples, in which scans, with how many slots."""

import dataclasses

import pytest

from pyramid_jax.units import SamplerPlan, Unit


def test_units_before_all_stages_remember_are_alone():
    """Unit 3 is the first of which stage 2 keeps something, if others come after it."""
    cfg = SamplerPlan(reuse=(0, 1, 2), scans=2)
    assert cfg.spans(12) == [(1, 2), (2, 3), (3, 4), (4, 8), (8, 12)]
    assert cfg.spans(4) == [(1, 2), (2, 3), (3, 4)]
    assert [cfg.remembered(12, k) for k in range(3)] == [10, 9, 8]
    assert [cfg.remembered(4, k) for k in range(3)] == [2, 1, 0]
    assert cfg.room((12, 8, 16, 4), 1) == 9 * 2 * 4 // 4
    slots = [cfg.unit(span[0], span, 1, 12).slots for span in cfg.spans(12)]
    assert slots == [2, 3, None, None, None]


def test_given_units_are_remembered_by_all_stages_at_once():
    cfg = SamplerPlan(reuse=(0, 1, 2), begin=6)
    assert cfg.spans(12) == [(6, 7), (7, 12)]
    assert [cfg.remembered(12, k) for k in range(3)] == [10, 9, 8]
    assert [cfg.remembered(7, k) for k in range(3)] == [0, 0, 0]  # one is to be made
    assert [cfg.unit(7, (7, 12), k, 12).slots for k in range(3)] == [None] * 3


def test_a_video_that_is_longer_than_its_window_reuses_nothing():
    cfg = SamplerPlan(reuse=(0, 1, 2), window=8)
    assert cfg.spans(10) == [(1, 10)] and cfg.unit(9, (1, 10), 0, 10).slots == 9
    assert cfg.spans(9) == dataclasses.replace(cfg, window=None).spans(9)


def test_no_scan_window_or_given_unit_is_refused():
    for name in ("scans", "window", "begin"):
        with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
            SamplerPlan(**{name: 0})


def test_a_clean_history_is_read_once_and_has_room_for_a_unit_more():
    """For the frames of one unit at every stage up to its own, of 8 and 32 tokens."""
    cfg = SamplerPlan(reuse=(0, 1), clean_history=True)
    shape = (12, 16, 32, 4)
    plain = dataclasses.replace(cfg, clean_history=False)
    assert cfg.room(shape, 0) == plain.room(shape, 0) + 8
    assert cfg.room(shape, 1) == plain.room(shape, 1) + 8 + 32
    assert cfg.room(shape, 2) == plain.room(shape, 2) == 0  # does not reuse
    first, later = Unit(0, 1), Unit(5, None)
    assert [cfg.reads_once(later, k) for k in range(3)] == [True, True, False]
    assert not cfg.reads_once(first, 0) and not plain.reads_once(later, 0)
