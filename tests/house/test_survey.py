# SPDX-License-Identifier: Apache-2.0
"""What docs/architecture.md counts can be counted again."""

from tests.house.sources import ROOT
from tests.house.survey import longest_chain, survey


def test_a_chain_is_as_long_as_it_has_rooms():
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3


def test_this_checkout_is_counted():
    numbers = survey(ROOT)
    rooms = numbers["rooms of the project"]
    assert numbers["files and folders in the package"] < rooms
    assert 3 < numbers["longest chain of imports between rooms"] < rooms
    assert numbers["code lines of the package"] < numbers["lines of the package"]
