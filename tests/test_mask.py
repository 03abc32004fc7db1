# SPDX-License-Identifier: Apache-2.0
"""Masks, written out: rows are queries, columns are keys, 1 means seen."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.compile.cases import batch, case, case_names
from pyramid_jax import mask

TOKENS = st.tuples(st.integers(-1, 5), st.integers(0, 40))


def drawn(picture: str) -> np.ndarray:
    """The matrix of a picture of 0 and 1, one line per query."""
    return np.array([line.split() for line in picture.strip().splitlines()]) == "1"


def seen(text: list[int], segment: list[int], frame: list[int], causal: bool = True):
    """The dense mask of one row."""
    parts = (
        jnp.array([part], jnp.int32).reshape(1, -1) for part in (text, segment, frame)
    )
    (matrix,) = mask.dense_mask(mask.joint(*parts, causal=causal))
    return matrix


def test_a_frame_sees_itself_and_the_frames_before():
    matrix = seen([], [0, 0, 0, 0, 0], [0, 0, 1, 1, 2])
    picture = """
    1 1 0 0 0
    1 1 0 0 0
    1 1 1 1 0
    1 1 1 1 0
    1 1 1 1 1"""
    np.testing.assert_array_equal(matrix, drawn(picture))


def test_text_sees_itself_and_the_first_frame_and_every_frame_sees_the_text():
    matrix = seen([0, 0], [0, 0, 0], [0, 1, 2])
    picture = """
    1 1 1 0 0
    1 1 1 0 0
    1 1 1 0 0
    1 1 1 1 0
    1 1 1 1 1"""
    np.testing.assert_array_equal(matrix, drawn(picture))


def test_padding_sees_nothing_and_is_not_seen():
    matrix = seen([-1, 0], [0, -1, 0, -1], [0, 0, 1, 5])
    picture = """
    0 0 0 0 0 0
    0 1 1 0 0 0
    0 1 1 0 0 0
    0 0 0 0 0 0
    0 1 1 0 1 0
    0 0 0 0 0 0"""
    np.testing.assert_array_equal(matrix, drawn(picture))


def test_segments_of_a_row_do_not_see_each_other():
    matrix = seen([0, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
    picture = """
    1 0 1 0 0 0 0
    0 1 0 0 1 0 0
    1 0 1 0 0 0 0
    1 0 1 1 0 0 0
    0 1 0 0 1 0 0
    0 1 0 0 1 1 0
    0 1 0 0 1 1 1"""
    np.testing.assert_array_equal(matrix, drawn(picture))


def test_without_causality_a_segment_sees_all_of_itself():
    matrix = seen([0, -1], [0, 0, 1], [0, 1, 2], causal=False)
    picture = """
    1 0 1 1 0
    0 0 0 0 0
    1 0 1 1 0
    1 0 1 1 0
    0 0 0 0 1"""
    np.testing.assert_array_equal(matrix, drawn(picture))


def test_rows_of_a_batch_have_masks_of_their_own():
    both = mask.TokenMask(jnp.array([[0, 0], [0, 1]]), jnp.array([[0, 1], [0, 0]]))
    expected = [[[1, 0], [1, 1]], [[1, 0], [0, 1]]]
    np.testing.assert_array_equal(mask.dense_mask(both), np.array(expected, bool))


def by_intervals(row: mask.TokenMask) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom by the interval of each query, and by that of each key."""
    own, first, last = (np.asarray(x) for x in mask.ranks(row))
    query, key = own[:, :, None], own[:, None]
    return (
        (first[:, :, None] <= key) & (key <= query),
        (key <= query) & (query <= last[:, None]),
    )


@given(st.lists(TOKENS, min_size=1, max_size=24))
def test_what_a_token_sees_and_who_sees_it_are_intervals_of_ranks(tokens):
    """In rows of any order."""
    row = mask.TokenMask(*np.array(tokens, np.int32).T[:, None])
    for seen in by_intervals(row):
        np.testing.assert_array_equal(seen, mask.dense_mask(row))


def test_the_intervals_of_every_case_are_its_mask():
    row = batch(case_names(), 90, 1 / 16)
    for seen in by_intervals(row):
        np.testing.assert_array_equal(seen, mask.dense_mask(row))


@pytest.mark.parametrize(
    ("name", "most"),
    [("768p stage 2 unit 15", 1), ("packed", 2), ("packed tightly", 2)],
)
def test_rows_lie_so_that_a_query_sees_one_run_of_keys_or_one_of_text_and_one_of_video(
    name, most
):
    """Rows of sampling are in the order of ranks; packed ones have texts first."""
    (seen,) = np.asarray(mask.dense_mask(case(name, 1 / 16)))
    begins = np.diff(seen.astype(int), axis=1, prepend=0) == 1
    assert begins.sum(axis=1).max() == most
