# SPDX-License-Identifier: Apache-2.0
"""The packing of the benchmark, where it can be counted by hand."""

import itertools

import pytest

from benchmarks import packing
from benchmarks.packing import Training, fullness, segments

IMAGES = Training("images", 1, 16, 40, 1)  # 1, 4, 16 and 16 tokens, all current


def test_segments_are_the_units_of_all_stages_and_images():
    found = list(itertools.islice(segments(Training("", 3, 16, 99, 2)), 7))
    assert found[3] == (0, 16)  # an image
    assert found[0] == (2, 1) and found[2] == (0, 16)  # last unit; first unit
    assert all(past % 1 == 0 and now in (1, 4, 16) for past, now in found)


def test_rows_of_images_leave_the_places_of_history_empty():
    """Two images of 16 tokens and small ones fill 40 places; 20 are left to them."""
    assert fullness(IMAGES) == pytest.approx(37 / 40, abs=0.03)
    assert fullness(IMAGES, current=20) <= 0.5


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(packing, "SEGMENTS", 300)
    packing.main()
    assert len(capsys.readouterr().out.splitlines()) == 8
