# SPDX-License-Identifier: Apache-2.0
"""Packed rows hold exactly the segments that the seed and the example's number say."""

import contextlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax import layout, pyramid
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.pipeline import DataConfig, batches, longest
from pyramid_jax.data.records import Clips, Pixels, nearest
from pyramid_jax.data.video_io import read_video, to_model, write_video
from pyramid_jax.layout import Layout
from pyramid_jax.shapes import Rows

LAYOUT = Layout(patch=2)
FRAMES, SIZE, STAGES = 4, (16, 16), 3


def tokenize(text: str) -> list[int]:
    """The words of a caption, which are numbers here, after a 1."""
    return [1, *(int(word) for word in text.split())]


def synthetic(record: Record, size: tuple[int, int]) -> np.ndarray:
    """A latent whose values differ everywhere, made from the record's caption."""
    rng = np.random.default_rng(int(record.text.split()[0]))
    frames = 1 if record.kind == "image" else FRAMES
    return rng.standard_normal((frames, *size, 3), np.float32)


class Part:
    """The part of one row that belongs to one segment."""

    def __init__(self, rows: Rows, row: int, index: int):
        mine = rows.segment[row] == index
        self.tokens = layout.Segment(
            *(field[row][mine] for field in (rows.clean, rows.coarser, rows.position)),
            *(field[row][mine] for field in (rows.frame, rows.current)),
        )
        self.text = rows.text[row][rows.text_segment[row] == index].tolist()
        self.stage = int(rows.stage[row, index])

    @property
    def unit(self) -> int:
        """The unit, where a unit is one frame."""
        return int(self.tokens.frame.max())


def parts(rows: Rows) -> Iterator[Part]:
    for row, index in zip(*np.nonzero(rows.stage >= 0), strict=True):
        yield Part(rows, row, index)


def assert_equal(a: Rows, b: Rows) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def opened(cfg: DataConfig, folder: Path, **options):
    """The iterator of a config, closed at the end; latents are synthetic by default."""
    options = {"load": synthetic} | options
    iterator = batches(cfg, LAYOUT, tokenize, folder, **options)
    try:
        yield iterator
    finally:
        iterator.close()


def take(count: int, cfg: DataConfig, folder: Path, **options) -> list[Rows]:
    with opened(cfg, folder, **options) as iterator:
        return list(itertools.islice(iterator, count))


def taken_parts(count: int, cfg: DataConfig, folder: Path, **options) -> list[Part]:
    """Parts in the order of the examples, if a row has one segment only."""
    return [
        part for rows in take(count, cfg, folder, **options) for part in parts(rows)
    ]


def config(folder: Path, records: list[Record] | None = None, **changes) -> DataConfig:
    """A config with a manifest of its own: by default 12 videos, captions 10 to 21."""
    if records is None:
        records = [Record(folder / f"{i}.mp4", "video", str(10 + i)) for i in range(12)]
    write_manifest(folder / "manifest.jsonl", records)
    cfg = DataConfig(
        manifest=folder / "manifest.jsonl",
        height=SIZE[0],
        width=SIZE[1],
        frames=FRAMES,
        fps=8,
        batch=2,
        tokens=300,
        text_tokens=12,
        segments=5,
        dropout=0.0,
    )
    return replace(cfg, **changes)


def write_clips(folder: Path, count: int, size: tuple[int, int] = SIZE) -> list[Record]:
    """Real files of plain colours."""
    records = []
    for i in range(count):
        video = np.full((FRAMES, *size, 3), 20 * i + 20, np.uint8)
        path = folder / f"{size[0]}x{size[1]}_{i}.mp4"
        write_video(path, video, 8)
        records.append(Record(path, "video", str(10 + i)))
    return records


# --------------------------------------------------------------------------------- rows


def test_every_part_of_a_row_equals_the_segment_made_alone(tmp_path):
    found = taken_parts(6, config(tmp_path), tmp_path)
    assert len(found) > 30
    for part in found:
        record = Record(tmp_path / "any.mp4", "video", str(part.text[1]))
        levels = pyramid.levels(synthetic(record, SIZE), STAGES)
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
    cfg = config(tmp_path, temporal=False, tokens=400)
    for part in taken_parts(4, cfg, tmp_path):
        assert part.tokens.current.all()
        assert len(part.tokens.frame) == FRAMES * 4 ** (1 + part.stage)
        assert set(part.tokens.frame) == set(range(FRAMES))


def test_files_are_decoded_to_the_range_of_the_models(tmp_path):
    records = write_clips(tmp_path, 2)
    cfg = config(tmp_path, records, stage_shares=(0, 0, 1), temporal=False)
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
    for rows in take(6, cfg, tmp_path):
        coarse, *_, fine = sorted(parts(rows), key=lambda part: part.stage)
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


def test_hosts_divide_the_examples_of_one_order(tmp_path):
    cfg = config(tmp_path, batch=6, segments=1)
    alone = [p.text for p in taken_parts(2, cfg, tmp_path)]
    host0, host1 = (
        [p.text for p in taken_parts(1, cfg, tmp_path, shard=(i, 2))] for i in (0, 1)
    )
    assert host0 == alone[0::2] and host1 == alone[1::2]


def test_two_hosts_sweep_the_units_together(tmp_path):
    cfg = config(tmp_path, batch=4, segments=1, stage_shares=(0, 0, 1))
    for host, expected in enumerate(([0, 2, 0, 2], [1, 3, 1, 3])):
        found = taken_parts(1, cfg, tmp_path, shard=(host, 2))
        assert [part.unit for part in found] == expected


def test_a_tenth_of_the_captions_is_dropped_whatever_the_stage(tmp_path):
    plan = config(tmp_path, dropout=0.1).plan(LAYOUT, (0, 1))
    dropped = Counter(plan.stage(i) for i in range(4000) if plan.drops_caption(i))
    # Shares of 1000, 2000 and 1000; the tolerance is four standard deviations.
    assert abs(dropped[0] - 100) < 38 and abs(dropped[2] - 100) < 38
    assert abs(dropped[1] - 200) < 54


def test_hosts_drop_captions_of_other_examples(tmp_path):
    cfg = config(tmp_path, dropout=0.5)
    alone, host0, host1 = (
        [cfg.plan(LAYOUT, shard).drops_caption(i) for i in range(100)]
        for shard in ((0, 1), (0, 2), (1, 2))
    )
    assert host0[:50] == alone[0::2] and host1[:50] == alone[1::2]


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
    cfg = replace(cfg, stage_shares=(0, 0, 1), temporal=False)
    for part in taken_parts(2, cfg, tmp_path, load=None):
        width = 16 if part.text[1] == 11 else 8
        assert part.tokens.position.max(axis=0).tolist() == [FRAMES - 1, 7, width - 1]


def test_the_nearest_size_is_the_same_for_tall_and_wide_pictures(tmp_path):
    sizes = ((16, 16), (16, 32), (32, 16))
    for size in sizes:
        record = write_clips(tmp_path, 1, size=(size[0], size[1] - 2))[0]
        assert nearest(sizes, record.path) == size


# ----------------------------------------------------------------------------- resuming


def resume(cfg: DataConfig, after: DataConfig, folder: Path, at: int, load) -> None:
    """After `at` batches another iterator goes on where the first one was."""
    with (
        opened(cfg, folder, load=load) as first,
        opened(after, folder, load=load) as second,
    ):
        for _ in range(at):
            next(first)
        second.set_state(json.loads(json.dumps(first.get_state())))
        for _ in range(4):
            assert_equal(next(first), next(second))


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_run_resumes_exactly_where_it_stopped(tmp_path, at):
    cfg = config(tmp_path, batch=3, dropout=0.3)
    resume(cfg, cfg, tmp_path, at, synthetic)


def test_an_iterator_that_has_moved_on_can_be_set_back(tmp_path):
    with opened(config(tmp_path), tmp_path) as iterator:
        next(iterator)
        state = iterator.get_state()
        before = [next(iterator) for _ in range(3)]
        iterator.set_state(state)
        for rows in before:
            assert_equal(rows, next(iterator))


# ---------------------------------------------------------------------------- bad files


def clips_and_broken(folder: Path, broken: int) -> list[Record]:
    records = write_clips(folder, 10)
    for i in range(broken):
        path = folder / f"broken{i}.mp4"
        path.write_bytes(b"no video")
        records.append(Record(path, "video", str(90 + i)))
    return records


def test_a_bad_file_is_skipped_logged_and_listed_once(tmp_path, caplog):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 1), segments=1, batch=10)
    cfg = replace(cfg, max_bad=0.1)
    found = taken_parts(3, cfg, tmp_path / "run", load=None)
    assert len(found) == 30 and {part.text[1] for part in found} == set(range(10, 20))
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 1
    listed = json.loads(lines[0])
    assert listed["path"] == str(tmp_path / "broken0.mp4")
    assert "can not be decoded" in listed["reason"]
    logged = [r for r in caplog.records if r.name == "pyramid_jax.data.packing"]
    assert len(logged) == 1 and listed["path"] in logged[0].getMessage()


def test_a_skipped_example_is_not_replaced_by_another(tmp_path):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 1), segments=1, batch=10)
    with_broken = taken_parts(1, replace(cfg, max_bad=0.1), tmp_path, load=None)
    all_sound = taken_parts(2, cfg, tmp_path)
    expected = [p for p in all_sound if p.text[1] < 90][:10]
    assert [(p.text, p.stage, p.unit) for p in with_broken] == [
        (p.text, p.stage, p.unit) for p in expected
    ]


def test_too_many_bad_files_stop_the_run_and_name_the_list(tmp_path):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 3), max_bad=0.2)  # 2 of 13 pass
    with pytest.raises(ValueError, match=r"3 of 13 files .*skipped\.jsonl lists them"):
        take(20, cfg, tmp_path, load=None)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_a_data_set_without_any_good_file_stops_even_if_all_may_be_bad(tmp_path):
    records = [Record(tmp_path / f"{i % 3}.mp4", "video", str(i)) for i in range(12)]
    cfg = config(tmp_path, records, max_bad=1.0)
    with pytest.raises(ValueError, match="3 of 3 files"):
        take(1, cfg, tmp_path, load=None)


def test_a_caption_longer_than_a_row_is_a_bad_record(tmp_path):
    records = [Record(tmp_path / "a.mp4", "video", "10 " * 12)]
    with pytest.raises(ValueError, match=r"caption of .*a\.mp4 has 13 tokens.* has 12"):
        take(1, config(tmp_path, records), tmp_path)


def test_a_latent_longer_than_a_row_is_a_bad_record(tmp_path):
    cfg = config(tmp_path, temporal=False, stage_shares=(0, 0, 1), tokens=256)
    with pytest.raises(ValueError, match=r"makes a segment of 320 tokens.* has 256"):
        take(1, cfg, tmp_path, load=lambda *_: np.zeros((5, *SIZE, 3), np.float32))


# ------------------------------------------------------------------------------ budgets


def test_the_longest_segment_is_the_last_unit_at_the_finest_stage(tmp_path):
    cfg = config(tmp_path)
    made = [
        len(layout.segment(levels, layout.compact(chosen), LAYOUT).frame)
        for levels in [pyramid.levels(np.zeros((FRAMES, *SIZE, 3), np.float32), STAGES)]
        for stage, unit in itertools.product(range(STAGES), range(FRAMES))
        for chosen in [layout.clips(stage, unit, FRAMES)]
    ]
    assert longest(cfg, LAYOUT).tokens == max(made) == made[-1]
    whole = replace(cfg, temporal=False, tokens=256)
    assert longest(whole, LAYOUT).tokens == FRAMES * 8 * 8


def test_the_longest_segment_of_a_latent_counts_its_cells(tmp_path):
    cfg = config(tmp_path, frames=9, height=128, width=128, stride=(4, 8))
    cells = np.zeros((3, 16, 16, 4), np.float32)
    chosen = layout.compact(layout.clips(2, 2, 3))
    alone = layout.segment(pyramid.levels(cells, STAGES), chosen, LAYOUT)
    assert longest(cfg, LAYOUT).tokens == len(alone.frame)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, r"has 100 tokens, but unit 3 .* needs 148; raise tokens"),
        ({"tokens": 255, "temporal": False}, "all frames at stage 2 .* needs 256"),
        ({"height": 20}, r"\(20, 16\) are not multiples of 8 .*use 16 and 16"),
        ({"sizes": ((16, 36),)}, r"\(16, 36\) are not multiples"),
        ({"stride": (2, 1)}, "4 frames are not 1 \\+ a multiple of 2 .*use 3 or 5"),
        ({"manifest": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_batch(
    tmp_path, changes, message
):
    cfg = config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        batches(cfg, LAYOUT, tokenize, tmp_path)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_host_outside_the_count_is_refused(tmp_path, shard):
    with pytest.raises(ValueError, match="shard"):
        batches(config(tmp_path), LAYOUT, tokenize, tmp_path, shard=shard)


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
        {"stride": (0, 1)},
    ],
)
def test_a_config_names_the_entry_that_makes_no_sense(tmp_path, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        config(tmp_path, **changes)


# ------------------------------------------------------------------------------- memory


class Counting:
    """Loads zeros and counts how often."""

    def __init__(self):
        self.loads = 0

    def __call__(self, record: Record, size: tuple[int, int]) -> np.ndarray:
        self.loads += 1
        return np.zeros((1, *size, 3), np.float32)


@pytest.mark.parametrize(("room", "loads"), [(0, 6), (2 * 192, 4), (3 * 192, 3)])
def test_clips_stay_in_memory_while_there_is_room(tmp_path, room, loads):
    load = Counting()
    clips = Clips(load, ((4, 4),), 1, room)  # 192 bytes each
    for name in "abcaac":
        clips[Record(tmp_path / name, "image", name)]
    assert load.loads == loads


# ------------------------------------------------------------------------------ workers


@pytest.mark.slow
def test_the_rows_do_not_depend_on_the_number_of_workers(tmp_path):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 1), max_bad=0.1, dropout=0.3)
    runs = [
        take(8, replace(cfg, workers=n), tmp_path / str(n), load=None) for n in range(3)
    ]
    assert not multiprocessing.active_children()
    for alone, one, two in zip(*runs, strict=True):
        assert_equal(alone, one)
        assert_equal(alone, two)
    for n in range(3):
        assert len((tmp_path / str(n) / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 0)])
def test_a_run_resumes_with_any_number_of_workers(tmp_path, before, after):
    cfg = config(tmp_path, write_clips(tmp_path, 5), batch=3)
    cfg, other = replace(cfg, workers=before), replace(cfg, workers=after)
    resume(cfg, other, tmp_path, at=3, load=Pixels(FRAMES, 8))


@pytest.mark.slow
def test_too_many_bad_files_of_workers_stop_the_run(tmp_path):
    cfg = config(tmp_path, max_bad=0.2, workers=1)
    with pytest.raises(ValueError, match="3 of 12 files"):
        take(5, cfg, tmp_path, load=None)


SCRIPT = """
import sys
from pyramid_jax.data.pipeline import DataConfig, batches
from pyramid_jax.layout import Layout

if __name__ == "__main__":
    cfg = DataConfig(sys.argv[1], 16, 16, 4, 8.0, 2, 300, 12, 5, workers=1)
    rows = batches(cfg, Layout(), lambda text: [len(text)], sys.argv[2])
    assert (next(rows).stage >= 0).any()
    rows.close()
"""


@pytest.mark.slow
def test_workers_need_neither_parsed_flags_nor_an_accelerator(tmp_path):
    """A platform that does not exist only raises when a backend is started."""
    cfg = config(tmp_path, write_clips(tmp_path, 2))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, script, cfg.manifest, tmp_path],
        env={**os.environ, "JAX_PLATFORMS": "missing", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr.decode()
