# SPDX-License-Identifier: Apache-2.0
"""Masks, written out: rows are queries, columns are keys, 1 means seen."""

import jax.numpy as jnp
import numpy as np

from pyramid_jax import mask


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
