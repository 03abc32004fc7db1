# SPDX-License-Identifier: Apache-2.0
"""Kept batches are the first ones, repeated in other orders, and can be resumed."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from pyramid_jax.data.kept import KeptBatches
from pyramid_jax.data.loader import batches
from tests.packed import assert_equal, config, synthetic, take, tokenize

COUNT = 3


def kept(tmp_path, seed: int = 0) -> KeptBatches:
    """The iterator of a data set of clips that are made up."""
    cfg = replace(config(tmp_path), kept=COUNT, seed=seed)
    made = batches(cfg, tokenize, tmp_path, load=synthetic)
    assert isinstance(made, KeptBatches)
    return made


def test_the_first_round_is_new_and_later_ones_have_other_orders(tmp_path):
    made = kept(tmp_path)
    found = list(islice(made, 4 * COUNT))
    made.close()
    for batch, other in zip(
        found, take(COUNT, config(tmp_path), tmp_path), strict=False
    ):
        assert_equal(batch, other)
    places = [[id(x) for x in found[i : i + COUNT]] for i in range(0, 4 * COUNT, COUNT)]
    assert all(set(round_) == set(places[0]) for round_ in places)
    assert len({tuple(round_) for round_ in places}) > 1


@pytest.mark.parametrize("taken", [COUNT - 1, COUNT + 2])
def test_a_resumed_run_gets_what_an_uninterrupted_one_gets(tmp_path, taken: int):
    one, other = kept(tmp_path), kept(tmp_path)
    list(islice(one, taken))
    other.set_state(one.get_state())
    for batch, again in zip(islice(one, 4), other, strict=False):
        for x, y in zip(batch, again, strict=True):
            np.testing.assert_array_equal(x, y)
    one.close(), other.close()
