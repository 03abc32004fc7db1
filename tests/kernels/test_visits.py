# SPDX-License-Identifier: Apache-2.0
"""The lists of blocks that kernels walk, against the dense mask they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from launch.compile.cases import GRIDS, STAGES, batch, case, case_names
from pyramid_jax import layout
from pyramid_jax.kernels import visits as module
from pyramid_jax.kernels.visits import ALL, NONE, SOME
from pyramid_jax.mask import TokenMask, dense_mask

SCALE, LENGTH = 1 / 16, 90
SIZES = [(16, 16), (8, 32)]
TIGHT = [name for name in case_names() if name != "scattered"]
kinds = jax.jit(module.kinds, static_argnums=(2, 3))
pairs, visits = jax.jit(module.pairs), jax.jit(module.visits)


def in_blocks(mask: TokenMask, query_size: int, key_size: int) -> np.ndarray:
    """The dense mask with padding to whole blocks: `b i j query key`."""
    seen = np.asarray(dense_mask(TokenMask(*map(jnp.asarray, mask))))
    more = [(0, 0), *((0, -seen.shape[1] % size) for size in (query_size, key_size))]
    pattern = "b (i query) (j key) -> b i j query key"
    return rearrange(np.pad(seen, more), pattern, query=query_size, key=key_size)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_kinds_of_pairs_are_those_of_the_dense_mask(sizes):
    mask = batch(TIGHT, LENGTH, SCALE)
    seen = in_blocks(mask, *sizes)
    kind = np.where(seen.all((3, 4)), ALL, np.where(seen.any((3, 4)), SOME, NONE))
    assert {NONE, SOME, ALL} <= set(kind.ravel())
    np.testing.assert_array_equal(kinds(mask, mask, *sizes), kind)


def test_kernels_visit_exactly_the_fraction_of_blocks_that_is_visible():
    """Counted on every case at once, in both lists, from both sides."""
    mask = batch(TIGHT, LENGTH, SCALE)
    visible = in_blocks(mask, 16, 16).any((3, 4))
    kind = kinds(mask, mask, 16, 16)
    kind = np.asarray(kind)
    for side, seen in ((kind, visible), (kind.swapaxes(1, 2), visible.swapaxes(1, 2))):
        assert int(visits(side).count.sum()) == seen.sum()
        walk = pairs(side)
        listed = np.asarray(walk.kind)[: int(walk.count[0])]
        assert (listed != NONE).sum() == seen.sum()
    assert 0.1 < visible.mean() < 0.5


def test_a_list_names_the_blocks_wholly_visible_first():
    mask = batch(TIGHT, LENGTH, SCALE)
    kind = np.asarray(kinds(mask, mask, 16, 16))
    walk = jax.tree.map(np.asarray, visits(kind))
    for b, i in np.ndindex(*walk.count.shape):
        whole, count = int(walk.whole[b, i]), int(walk.count[b, i])
        block = np.asarray(walk.block[b, i])
        assert set(block[:whole]) == set(np.flatnonzero(kind[b, i] == ALL))
        assert set(block[whole:count]) == set(np.flatnonzero(kind[b, i] == SOME))


def test_a_list_of_pairs_goes_through_the_batch_block_by_block():
    """Blocks that see nothing stand alone, and name what is loaded already."""
    kind = np.array([[[1, 0], [0, 0]], [[0, 0], [2, 1]]], np.int32)
    walk = pairs(kind)
    assert int(walk.count[0]) == 5
    np.testing.assert_array_equal(walk.own, [0, 1, 2, 3, 3, -1, -1, -1, -1])
    np.testing.assert_array_equal(walk.other[:5], [0, 0, 0, 2, 3])
    np.testing.assert_array_equal(walk.kind[:5], [SOME, NONE, NONE, ALL, SOME])


def test_more_segments_than_are_told_apart_hide_no_pair():
    """Segments 0 and 320 share a place; the pair is visited, though not visible."""
    segment = np.repeat(np.array([[0, 320, 7]], np.int32), 8, axis=1)
    mask = TokenMask(segment, np.zeros_like(segment))
    expected = [[[ALL, SOME, NONE], [SOME, ALL, NONE], [NONE, NONE, ALL]]]
    np.testing.assert_array_equal(kinds(mask, mask, 8, 8), expected)


@pytest.mark.parametrize("unit", [0, 1, 8, 15])
@pytest.mark.parametrize("stage", range(STAGES))
def test_the_cases_have_the_tokens_that_the_layout_chooses(stage, unit):
    mask = case(f"384p stage {stage} unit {unit}")
    chosen = layout.compact(layout.clips(stage, unit, unit + 1))
    cells = [np.prod(GRIDS["384p"]) // 4 ** (STAGES - 1 - s) for s in range(STAGES)]
    frame = np.concatenate([np.repeat(c.frame, cells[c.stage]) for c in chosen])
    video = mask.frame[0, -len(frame) :]
    np.testing.assert_array_equal(video, frame)
    assert mask.frame.shape[1] == len(frame) + 128


def test_a_case_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no case '1080p'"):
        case("1080p")
