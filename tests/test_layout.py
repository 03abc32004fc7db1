# SPDX-License-Identifier: Apache-2.0
"""Clips, positions and tokens against versions written out with lists and loops."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import layout, pyramid
from pyramid_jax.layout import Clip, Layout

Kept = list[tuple[int, int]]  # (stage, frame) of every frame that is seen
CASES = list(product(range(4), range(12), (1, 2, 3)))  # stage, unit, frames per unit


def literal(stage: int, unit: int, per_unit: int) -> Kept:
    """What `stage` of `unit` sees, then the unit: slices of lists, newest first."""
    if unit == 0:
        return [(stage, 0)]
    done = list(range(1 + (unit - 1) * per_unit))
    pieces = [(stage, done[-per_unit:])]
    level, back = stage, 1
    while back < unit and (level := max(level - 1, 0)):
        back += 1
        start, end = -back * per_unit, -(back - 1) * per_unit
        pieces.append((level, done[start:end]))
    if level == 0 and back < unit:
        pieces.append((0, done[: -back * per_unit]))
    new = [(stage, 1 + (unit - 1) * per_unit + i) for i in range(per_unit)]
    return [(s, f) for s, frames in reversed(pieces) for f in frames] + new


def kept(clips: tuple[Clip, ...]) -> Kept:
    return [(clip.stage, int(f)) for clip in clips for f in clip.frame]


def video(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------- units and clips


@pytest.mark.parametrize(
    ("frames", "per_unit", "count"), [(1, 1, 1), (16, 1, 16), (1, 3, 1), (7, 3, 3)]
)
def test_a_video_is_a_first_frame_and_whole_units(frames, per_unit, count):
    assert layout.units(frames, per_unit) == count
    every = [f for u in range(count) for f in layout.unit_frames(u, per_unit) if f >= 0]
    assert every == list(range(frames))


@pytest.mark.parametrize(
    ("frames", "advice"),
    [(0, "use 1 or 4"), (2, "use 1 or 4"), (6, "use 4 or 7"), (-5, "use 1 or 4")],
)
def test_frames_that_fill_no_whole_units_are_refused(frames, advice):
    with pytest.raises(
        ValueError, match=rf"^{frames} latent frames .* of 3 .*{advice}$"
    ):
        layout.units(frames, 3)


@pytest.mark.parametrize(("frames", "whole"), [(1, 1), (3, 1), (4, 4), (9, 7)])
def test_a_video_is_cut_to_whole_units(frames, whole):
    assert layout.Layout(frames_per_unit=3).longest(frames) == whole
    assert layout.Layout(frames_per_unit=3, history="none").longest(frames) == frames


@pytest.mark.parametrize("slack", [0, 1, 5])
def test_clips_are_the_slices_of_the_original(slack):
    for stage, unit, per_unit in CASES:
        chosen = layout.clips(stage, unit, unit + 1 + slack, per_unit)
        assert kept(layout.compact(chosen)) == literal(stage, unit, per_unit)


def test_every_past_frame_is_seen_exactly_once_and_in_order():
    for stage, unit, per_unit in CASES:
        chosen = layout.compact(layout.clips(stage, unit, 12, per_unit))
        frames = [frame for _, frame in kept(chosen)]
        assert frames == list(range(1 + unit * per_unit))


def test_the_released_pyramid_in_words():
    assert kept(layout.compact(layout.clips(2, 4, 16))) == [
        (0, 0),
        (0, 1),
        (1, 2),
        (2, 3),
        (2, 4),
    ]
    assert kept(layout.compact(layout.clips(2, 1, 16))) == [(2, 0), (2, 1)]
    assert kept(layout.compact(layout.clips(0, 2, 16))) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("slack", [0, 1, 5])
def test_a_full_history_keeps_all_frames_at_the_resolution_of_the_unit(slack):
    for stage, unit, per_unit in CASES:
        slots = unit + 1 + slack
        chosen = layout.clips(stage, unit, slots, per_unit, layout.FULL)
        every = [(stage, frame) for frame in range(1 + unit * per_unit)]
        assert kept(layout.compact(chosen)) == every


@pytest.mark.parametrize(
    ("cells", "frames", "full", "pyramidal"),
    [((48, 80), 16, 15_360, 2_940), ((96, 160), 31, 119_040, 15_360)],
)
def test_the_temporal_pyramid_saves_the_tokens_that_the_paper_says(
    cells, frames, full, pyramidal
):
    """The last unit of 5 s at 384p and of 10 s at 768p, at the finest stage."""
    per_frame = [cells[0] * cells[1] // 4 // 4 ** (2 - stage) for stage in range(3)]

    def tokens(*chosen: Clip) -> int:
        return sum(per_frame[stage] for stage, _ in kept(chosen))

    at = 2, frames - 1, frames, 1
    assert tokens(*layout.clips(*at, layout.PYRAMID)) == pyramidal
    assert tokens(*layout.clips(*at, layout.FULL)) == full
    assert tokens(layout.first_clip(2, frames)) == full


def test_without_history_a_video_of_any_length_is_one_unit():
    sequences, others = Layout(history="none"), Layout(frames_per_unit=3)
    assert [sequences.units(frames) for frames in (1, 6)] == [1, 1]
    assert sequences.unit_size(True, 6) == 6
    assert (others.units(7), others.unit_size(True, 7)) == (3, 1)
    assert others.unit_size(False, 7) == 3


def test_the_first_clip_of_one_frame_is_that_of_unit_0():
    for stage in range(3):
        (expected,), clip = layout.clips(stage, 0, 1), layout.first_clip(stage, 1)
        assert clip.stage == expected.stage
        np.testing.assert_array_equal(clip.frame, expected.frame)


def test_an_unknown_history_is_refused():
    with pytest.raises(ValueError, match="history 'half' must be one of"):
        Layout(history="half")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize("history", ["pyramid", "full"])
def test_a_traced_unit_gives_the_clips_of_a_known_one(stage, per_unit, history):
    slots = 6

    @jax.jit
    def frames(unit: jax.Array) -> list[jax.Array]:
        chosen = layout.clips(stage, unit, slots, per_unit, history)
        return [clip.frame for clip in chosen]

    for unit in range(slots):
        known = layout.clips(stage, unit, slots, per_unit, history)
        for clip, traced in zip(known, frames(jnp.int32(unit)), strict=True):
            np.testing.assert_array_equal(clip.frame, traced)


def test_sizes_of_clips_depend_on_slots_alone():
    for stage, per_unit in product(range(4), (1, 2)):
        sizes = [
            [(c.stage, len(c.frame)) for c in layout.clips(stage, unit, 8, per_unit)]
            for unit in range(8)
        ]
        assert all(size == sizes[0] for size in sizes)


# ----------------------------------------------------------------------- balanced units


def test_turns_sweep_every_unit_at_every_stage():
    turns = [layout.balanced_units(turn, 16, 16) for turn in range(32)]
    fine, coarser = zip(*turns, strict=True)
    assert sorted(fine) == sorted(coarser) == sorted([*range(16), *range(16)])
    assert all(a + b == 15 for a, b in turns)


def test_short_clips_train_their_last_unit():
    turns = [layout.balanced_units(turn, 8, 3) for turn in range(8)]
    assert turns == [(0, 2), (1, 2), *[(2, 2)] * 4, (2, 1), (2, 0)]


def test_balanced_units_bound_the_length_of_a_row():
    """384 x 640, 16 latent frames, a segment of each stage: 3,240 to 4,200 tokens.

    Long units at all stages together would need 5,220.
    """
    per_frame = (60, 240, 960)

    def length(stage: int, unit: int) -> int:
        return sum(per_frame[s] for s, _ in literal(stage, unit, 1))

    rows = [layout.balanced_units(turn, 16, 16) for turn in range(16)]
    totals = [length(2, f) + length(1, c) + length(0, c) for f, c in rows]
    assert (min(totals), max(totals)) == (3_240, 4_200)
    assert sum(length(stage, 15) for stage in range(3)) == 5_220


# ------------------------------------------------------------------------------- tokens


def test_tokens_are_patches_in_reading_order_with_values_in_reading_order():
    x = video(2, 3, 4, 6, 5)
    tokens = layout.patchify(x, 2)
    assert tokens.shape == (2, 18, 20)
    places = product(range(2), range(3), range(2), range(3))
    for n, (b, t, h, w) in enumerate(places):
        patch = [
            x[b, t, 2 * h + i, 2 * w + j, c]
            for i, j, c in product(range(2), range(2), range(5))
        ]
        np.testing.assert_array_equal(tokens[b, n % 18], patch)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_undoes_patchify(patch):
    x = video(2, 3, 4, 8, 5)
    tokens = layout.patchify(x, patch)
    whole = layout.unpatchify(tokens, layout.grid(x, patch), patch)
    np.testing.assert_array_equal(whole, x)


@pytest.mark.parametrize("coarser", [0, 1, 2])
def test_positions_are_centres_of_what_a_token_covers(coarser):
    target, own = (4, 8), (4 >> coarser, 8 >> coarser)
    size = 2**coarser
    expected = [
        (frame, (y + 0.5) * size - 0.5, (x + 0.5) * size - 0.5)
        for frame, y, x in product((3, 7), range(own[0]), range(own[1]))
    ]
    places = layout.positions(np.array([3, 7]), own, target, Layout())
    np.testing.assert_array_equal(places, expected)


def test_positions_of_coarser_history_are_those_of_the_original():
    """2i + 0.5 for half the size, 4i + 1.5 for a quarter."""
    for own, first in (((4, 4), [0.5, 2.5, 4.5, 6.5]), ((2, 2), [1.5, 5.5])):
        places = layout.positions(np.array([0]), own, (8, 8), Layout())
        np.testing.assert_array_equal(np.unique(places[:, 1]), first)


@pytest.mark.parametrize(("cells", "first"), [(12, 90), (48, 72), (80, 56), (5, 93)])
def test_with_a_table_positions_are_centred_in_it(cells, first):
    centred = layout.positions(
        np.array([2]), (cells, cells), (cells, cells), Layout(position_table=192)
    )
    plain = layout.positions(np.array([2]), (cells, cells), (cells, cells), Layout())
    np.testing.assert_array_equal(centred - plain, [[0, first, first]] * cells**2)


@pytest.mark.parametrize("target", [(17, 8), (8, 17)])
def test_a_grid_that_is_larger_than_the_table_is_refused(target):
    with pytest.raises(ValueError, match=r"17 tokens .* table of 16 cells"):
        layout.positions(np.array([0]), (4, 4), target, Layout(position_table=16))


@pytest.mark.parametrize("wrong", [{"patch": 0}, {"frames_per_unit": 0}])
def test_an_impossible_layout_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} 0 must be 1 or more"):
        Layout(**wrong)


def test_without_interpolation_clips_keep_the_cells_of_their_own_grid():
    cut = Layout(position_table=16, interpolate=False)
    places = layout.positions(np.array([0]), (2, 2), (8, 8), cut)
    np.testing.assert_array_equal(np.unique(places[:, 1:]), [7, 8])


@pytest.mark.parametrize("per_unit", [1, 2])
@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("history", ["pyramid", "full"])
def test_a_training_segment_is_what_the_sampler_sees(stage, per_unit, history):
    """Tokens, places and order agree, though the sampler's are traced and padded."""
    cut = Layout(position_table=16, frames_per_unit=per_unit, history=history)
    clean, slots = video(1, 1 + 3 * per_unit, 8, 16, 3), 4
    levels = pyramid.levels(clean, 3)

    @jax.jit
    def seen(unit: jax.Array) -> layout.Tokens:
        *past, current = layout.clips(stage, unit, slots, per_unit, history)
        target = layout.grid(levels[stage], cut.patch)
        now = jnp.asarray(levels[stage])[:, current.frame.clip(0)]
        parts = layout.history_tokens(
            [jnp.asarray(x) for x in levels], past, stage, cut
        )
        return layout.join([*parts, layout.tokens(now, current.frame, target, cut)])

    for unit in range(slots):
        row = seen(jnp.int32(unit))
        row = type(row)(*(field[0, row.segment[0] == 0] for field in row))
        chosen = layout.compact(layout.clips(stage, unit, slots, per_unit, history))
        segment = layout.segment([level[0] for level in levels], chosen, cut)
        np.testing.assert_array_equal(row.values, segment.clean)
        np.testing.assert_array_equal(row.position, segment.position)
        np.testing.assert_array_equal(row.frame, segment.frame)


def test_only_the_current_unit_is_marked_and_knows_its_coarser_level():
    clean = video(3, 8, 8, 2)
    levels = pyramid.levels(clean, 3)
    chosen = layout.compact(layout.clips(2, 2, 3))
    segment = layout.segment(levels, chosen, Layout())
    np.testing.assert_array_equal(segment.current, segment.frame == 2)
    below = layout.patchify(pyramid.up(pyramid.down(clean[2:])), 2)
    np.testing.assert_array_equal(segment.coarser[segment.current], below)
    np.testing.assert_array_equal(segment.coarser[~segment.current], 0.0)


def test_a_segment_at_the_first_stage_has_no_coarser_level():
    levels = pyramid.levels(video(2, 8, 8, 2), 2)
    chosen = layout.compact(layout.clips(0, 1, 2))
    segment = layout.segment(levels, chosen, Layout())
    np.testing.assert_array_equal(segment.coarser, 0.0)


def test_empty_slots_are_padding():
    x = video(1, 3, 2, 2, 1)
    row = layout.tokens(x, np.array([0, -1, 4]), (1, 1), Layout())
    np.testing.assert_array_equal(row.segment, [[0, -1, 0]])
    np.testing.assert_array_equal(row.frame, [[0, -1, 4]])
