# SPDX-License-Identifier: Apache-2.0
"""Packed rows hold exactly the segments that the seed and the example's number say."""

import itertools
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from pyramid_jax import layout, pyramid
from pyramid_jax.data.examples import drops_caption, stage_of
from pyramid_jax.data.loader import batches, longest
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.pixels import to_model
from pyramid_jax.data.source import ArrayCache, nearest_size
from pyramid_jax.data.video_io import read_video
from pyramid_jax.latents import LatentConfig
from pyramid_jax.shapes import Rows
from tests.packed import (
    FRAMES,
    LAYOUT,
    SEQUENCES,
    SIZE,
    STAGES,
    assert_equal,
    config,
    parts,
    synthetic,
    take,
    taken_parts,
    tokenize,
    write_clips,
)

# --------------------------------------------------------------------------------- rows


def test_every_part_of_a_row_equals_the_segment_made_alone(tmp_path):
    found = taken_parts(6, config(tmp_path), tmp_path)
    assert len(found) > 30
    for part in found:
        record = Record(tmp_path / "any.mp4", "video", str(part.text[1]))
        levels = pyramid.levels(synthetic(record, (SIZE,)), STAGES)
        chosen = layout.compact(layout.clips(part.stage, part.unit, FRAMES))
        alone = layout.segment(levels, chosen, LAYOUT)
        jax.tree.map(np.testing.assert_array_equal, part.tokens, alone)


def test_padding_is_empty_and_has_the_types_of_the_vocabulary(tmp_path):
    rows = take(1, config(tmp_path), tmp_path)[0]
    assert isinstance(rows, Rows)
    assert rows.clean.shape == (2, 300, 12) and rows.pooled.shape == (2, 5, 0)
    assert rows.stage.shape == (2, 5) and rows.text.shape == (2, 12)
    empty = rows.segment == -1
    assert empty.any()
    for field in (rows.clean, rows.coarser, rows.position, rows.frame, rows.current):
        assert not field[empty].any()
    assert not rows.text[rows.text_segment == -1].any()
    assert {field.dtype.name for field in rows} == {"float32", "int32", "bool"}
    assert all(field.flags.c_contiguous for field in rows)


def test_no_row_exceeds_the_text_budget_or_the_number_of_segments(tmp_path):
    few_words = config(tmp_path, text_tokens=4, tokens=2000)
    assert max(len([*parts(rows)]) for rows in take(3, few_words, tmp_path)) == 4
    few_segments = config(tmp_path, segments=3, tokens=2000)
    assert all(len([*parts(rows)]) == 6 for rows in take(3, few_segments, tmp_path))


def test_without_temporal_pyramid_segments_hold_all_frames(tmp_path):
    cfg = config(tmp_path, layout=SEQUENCES, tokens=400)
    for part in taken_parts(4, cfg, tmp_path):
        assert part.tokens.current.all()
        assert len(part.tokens.frame) == FRAMES * 4 ** (1 + part.stage)
        assert set(part.tokens.frame) == set(range(FRAMES))


def test_files_are_decoded_to_the_range_of_the_models(tmp_path):
    records = write_clips(tmp_path, 2)
    cfg = config(tmp_path, records, stage_shares=(0, 0, 1), layout=SEQUENCES)
    for part in taken_parts(2, cfg, tmp_path, load=None):
        path = records[part.text[1] - 10].path
        video = to_model(read_video(path, SIZE, FRAMES, 8))
        expected = layout.patchify(video, LAYOUT.patch)
        np.testing.assert_array_equal(part.tokens.clean, expected)


# ----------------------------------------------------------------- stages, units, order


def test_stages_have_their_shares_and_every_unit_occurs_equally_often(tmp_path):
    cfg = config(tmp_path, batch=8, segments=1, stage_shares=(1, 2, 1))
    found = taken_parts(8, cfg, tmp_path)  # 64 examples, 16 groups, 4 units
    counts = Counter((part.stage, part.unit) for part in found)
    assert counts == {
        (stage, unit): share * 4
        for stage, share in enumerate((1, 2, 1))
        for unit in range(FRAMES)
    }


def test_a_long_fine_segment_meets_short_coarse_ones(tmp_path):
    cfg = config(tmp_path, batch=4, segments=1, stage_shares=(1, 2, 1))
    for row in zip(*(parts(rows) for rows in take(12, cfg, tmp_path)), strict=True):
        for at in (0, 4, 8):
            coarse, *_, fine = sorted(row[at : at + 4], key=lambda part: part.stage)
            assert coarse.unit + fine.unit == FRAMES - 1


def test_a_stage_without_share_does_not_occur(tmp_path):
    cfg = config(tmp_path, stage_shares=(1, 0, 1))
    assert {part.stage for part in taken_parts(6, cfg, tmp_path)} == {0, 2}


def test_every_record_occurs_once_per_epoch_in_an_order_of_its_own(tmp_path):
    cfg = config(tmp_path, batch=12, segments=1)
    epochs = [[p.text[1] for p in parts(rows)] for rows in take(3, cfg, tmp_path)]
    assert all(sorted(epoch) == list(range(10, 22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_another_seed_gives_another_order(tmp_path):
    first, other = (
        [p.text for p in taken_parts(2, config(tmp_path, seed=seed), tmp_path)]
        for seed in (0, 1)
    )
    assert first != other


def test_hosts_divide_the_rows_of_one_batch(tmp_path):
    cfg = config(tmp_path, batch=6, dropout=0.5)
    whole = take(10, cfg, tmp_path)
    for rows in ([0, 1, 2], [5], [0, 2, 3, 4]):
        part = take(10, cfg, tmp_path, rows=rows)
        for all_rows, own in zip(whole, part, strict=True):
            assert_equal(jax.tree.map(lambda x, i=rows: x[i], all_rows), own)


def test_rows_side_by_side_sweep_stages_and_units(tmp_path):
    cfg = config(tmp_path, batch=4, segments=1, stage_shares=(1, 1, 1))
    for rows in (taken := take(24, cfg, tmp_path)):
        assert {part.stage for part in parts(rows)} == {0, 1, 2}
    for row in range(4):  # and every row has all of them in the course of time
        seen = [list(parts(rows))[row] for rows in taken]
        fine = [part.unit for part in seen if part.stage == 2]
        assert sorted(fine) == sorted([*range(FRAMES)] * 2)


def test_a_tenth_of_the_captions_is_dropped_whatever_the_stage(tmp_path):
    cfg = config(tmp_path, dropout=0.1)
    dropped = Counter(stage_of(cfg, i) for i in range(4000) if drops_caption(cfg, i))
    # Shares of 1000, 2000 and 1000; the tolerance is four standard deviations.
    assert abs(dropped[0] - 100) < 38 and abs(dropped[2] - 100) < 38
    assert abs(dropped[1] - 200) < 54


def test_a_dropped_caption_is_the_tokens_of_the_empty_one(tmp_path):
    found = taken_parts(2, config(tmp_path, dropout=1.0), tmp_path)
    assert all(part.text == tokenize("") for part in found)


# --------------------------------------------------------------- images, aspect ratios


def test_images_train_their_only_frame_beside_videos(tmp_path):
    records = [
        Record(tmp_path / f"{i}", "image" if i % 2 else "video", str(10 + i))
        for i in range(8)
    ]
    found = taken_parts(6, config(tmp_path, records), tmp_path)
    images = [part for part in found if part.text[1] % 2]
    videos = [part for part in found if not part.text[1] % 2]
    assert {part.unit for part in images} == {0}
    assert {part.stage for part in images} == {0, 1, 2}
    assert all(part.tokens.current.all() for part in images)
    assert {part.unit for part in videos} == set(range(FRAMES))


def test_files_get_the_size_of_the_nearest_aspect_ratio(tmp_path):
    square, wide = write_clips(tmp_path, 1), write_clips(tmp_path, 1, size=(16, 30))
    records = [*square, replace(wide[0], text="11")]
    cfg = config(tmp_path, records, sizes=((16, 32),), tokens=512)
    cfg = replace(cfg, stage_shares=(0, 0, 1), layout=SEQUENCES)
    for part in taken_parts(2, cfg, tmp_path, load=None):
        width = 16 if part.text[1] == 11 else 8
        assert part.tokens.position.max(axis=0).tolist() == [FRAMES - 1, 7, width - 1]


def test_the_nearest_size_is_the_same_for_tall_and_wide_pictures(tmp_path):
    sizes = ((16, 16), (16, 32), (32, 16))
    for size in sizes:
        record = write_clips(tmp_path, 1, size=(size[0], size[1] - 2))[0]
        assert nearest_size(sizes, record) == size


# ------------------------------------------------------------------------------ budgets


def test_the_longest_segment_is_the_last_unit_at_the_finest_stage(tmp_path):
    cfg = config(tmp_path)
    made = [
        len(layout.segment(levels, layout.compact(chosen), LAYOUT).frame)
        for levels in [pyramid.levels(np.zeros((FRAMES, *SIZE, 3), np.float32), STAGES)]
        for stage, unit in itertools.product(range(STAGES), range(FRAMES))
        for chosen in [layout.clips(stage, unit, FRAMES)]
    ]
    assert longest(cfg).tokens == max(made) == made[-1]
    whole = replace(cfg, layout=SEQUENCES, tokens=256)
    assert longest(whole).tokens == FRAMES * 8 * 8


def test_the_longest_segment_of_a_latent_counts_its_cells(tmp_path):
    latent = LatentConfig(4, spatial=8, temporal=4)
    cfg = config(tmp_path, frames=9, height=128, width=128, latent=latent)
    cells = np.zeros((3, 16, 16, 4), np.float32)
    chosen = layout.compact(layout.clips(2, 2, 3))
    alone = layout.segment(pyramid.levels(cells, STAGES), chosen, LAYOUT)
    assert longest(cfg).tokens == len(alone.frame)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, r"has 100 tokens, but unit 3 .* needs 148; raise tokens"),
        ({"tokens": 255, "layout": SEQUENCES}, "all frames at stage 2 .* needs 256"),
        ({"height": 20}, "height 20 is not a multiple of 8 .*use 16 or 24"),
        ({"sizes": ((16, 36),)}, "width 36 is not a multiple of 8"),
        (
            {"latent": LatentConfig(3, 1, 2)},
            r"4 frames are not 1 \+ a multiple of 2; use 3 or 5",
        ),
        ({"manifest": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_batch(
    tmp_path, changes, message
):
    cfg = config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        batches(cfg, tokenize, tmp_path)


@pytest.mark.parametrize("rows", [[2], [-1], []])
def test_rows_outside_the_batch_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"rows .* of a batch of 2"):
        batches(config(tmp_path), tokenize, tmp_path, rows=rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"fps": 0.0},
        {"workers": -1},
        {"dropout": 1.5},
        {"max_bad": -0.1},
        {"stage_shares": (0, 0)},
        {"stage_shares": ()},
        {"stage_shares": (1, -1)},
        {"sizes": ((0, 16),)},
    ],
)
def test_a_config_names_the_entry_that_makes_no_sense(tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        config(tmp_path, **changes)


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("room", "loads"), [(0, 6), (2 * 192, 4), (3 * 192, 3)])
def test_clips_stay_in_memory_while_there_is_room(room, loads):
    loaded = []

    def load() -> list[np.ndarray]:
        loaded.append(np.zeros((1, 4, 4, 3), np.float32))  # 192 bytes
        return loaded[-1:]

    cache = ArrayCache(room)
    for name in "abcaac":
        (clip,) = cache.get(name, load)
        assert clip.shape == (1, 4, 4, 3)
    assert len(loaded) == loads
