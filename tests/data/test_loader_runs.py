# SPDX-License-Identifier: Apache-2.0
"""Long runs of the data pipeline: stopped and resumed, with bad files, with workers."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax.data.examples import DataConfig, encoded_latent
from pyramid_jax.data.manifest import Record
from tests.packed import (
    SEQUENCES,
    SIZE,
    assert_equal,
    config,
    opened,
    parts,
    synthetic,
    take,
    taken_parts,
    write_clips,
)

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


def encode(pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Raw latents with a noise that is each file's own."""
    noise = (numbers % 251)[:, None, None, None, None] / 1000
    return pixels.astype(np.float32) / 255 + noise


def test_threads_encode_files_in_the_order_of_examples(tmp_path):
    cfg = config(tmp_path, write_clips(tmp_path, 6), batch=2, encode=True)
    load = partial(encoded_latent, cfg, encode)
    taken = [
        take(4, replace(cfg, workers=n), tmp_path / str(n), load=load) for n in (0, 2)
    ]
    for one, two in zip(*taken, strict=True):
        assert_equal(one, two)
    assert np.unique(taken[0][0].clean).size > 5  # zeros, and files in their grounds
    with pytest.raises(ValueError, match="name its folder as `autoencoder`"):
        take(1, cfg, tmp_path, load=None)


def test_an_iterator_that_has_moved_on_can_be_set_back(tmp_path):
    with opened(config(tmp_path), tmp_path) as iterator:
        next(iterator)
        state = iterator.get_state()
        before = [next(iterator) for _ in range(3)]
        iterator.set_state(state)
        for rows in before:
            assert_equal(rows, next(iterator))


@pytest.mark.parametrize("segments", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_every_example_comes_once_whatever_hosts_there_are(tmp_path, segments):
    """One host, then two, then four, then one: each example once in each epoch."""
    cfg = config(tmp_path, batch=4, segments=segments, tokens=600)
    hosts = [[range(4)], [(0, 1), (2, 3)], [(3,), (0,), (2,), (1,)], [range(4)]]
    state, taken = {}, []
    for shares in hosts:
        found, merged = {}, {}
        for rows in shares:
            with opened(cfg, tmp_path, rows=rows) as iterator:
                if state:
                    iterator.set_state(json.loads(json.dumps(state)))
                successive = [next(iterator) for _ in range(3)]
                merged |= iterator.get_state()
            for place, row in enumerate(rows):
                found[row] = [
                    jax.tree.map(lambda x, i=place: x[i], b) for b in successive
                ]
        state = merged
        for rows in zip(*(found[row] for row in range(4)), strict=True):
            taken.append(jax.tree.map(lambda *x: np.stack(x), *rows))
    if segments == 1:  # twelve batches of four are four epochs of twelve records
        texts = [part.text[1] for rows in taken for part in parts(rows)]
        epochs = [sorted(texts[at : at + 12]) for at in range(0, 48, 12)]
        assert epochs == [list(range(10, 22))] * 4
    for expected, rows in zip(take(12, cfg, tmp_path), taken, strict=True):
        assert_equal(expected, rows)


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
    assert "cannot be decoded" in listed["reason"]
    logged = [r for r in caplog.records if r.name == "pyramid_jax.data.source"]
    assert len(logged) == 1 and listed["path"] in logged[0].getMessage()


def test_a_skipped_example_is_not_replaced_by_another(tmp_path):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 1), segments=1, batch=1)
    with_broken = taken_parts(10, replace(cfg, max_bad=0.1), tmp_path, load=None)
    all_sound = taken_parts(12, cfg, tmp_path)
    expected = [p for p in all_sound if p.text[1] < 90][:10]
    assert [(p.text, p.stage, p.unit) for p in with_broken] == [
        (p.text, p.stage, p.unit) for p in expected
    ]


def test_too_many_bad_files_stop_the_run_and_name_the_list(tmp_path):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 4), max_bad=0.2)  # 3 of 14 pass
    stopped = r"4 of 14 files .*skipped\.jsonl lists them.*--config\.data\.max_bad"
    with pytest.raises(ValueError, match=stopped):
        take(20, cfg, tmp_path, load=None)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("max_bad", "ends"), [(0.01, False), (0.0, True)])
def test_a_small_set_may_have_a_bad_file_unless_none_is_allowed(
    tmp_path, max_bad, ends
):
    cfg = config(tmp_path, clips_and_broken(tmp_path, 1), max_bad=max_bad)
    refused = pytest.raises(ValueError, match="1 of 11 files")
    with refused if ends else contextlib.nullcontext():
        take(4, cfg, tmp_path, load=None)


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
    cfg = config(tmp_path, layout=SEQUENCES, stage_shares=(0, 0, 1), tokens=256)
    with pytest.raises(ValueError, match=r"makes a segment of 320 tokens.* has 256"):
        take(1, cfg, tmp_path, load=lambda *_: np.zeros((5, *SIZE, 3), np.float32))


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
    resume(cfg, other, tmp_path, at=3, load=None)


@pytest.mark.slow
def test_too_many_bad_files_of_workers_stop_the_run(tmp_path):
    cfg = config(tmp_path, max_bad=0.2, workers=1)
    with pytest.raises(ValueError, match=r"[34] of 12 files"):
        take(5, cfg, tmp_path, load=None)


SCRIPT = """
import sys
from pyramid_jax.data.examples import DataConfig
from pyramid_jax.data.loader import batches

if __name__ == "__main__":
    cfg = DataConfig(sys.argv[1], 16, 16, 4, 8.0, 2, 300, 12, 5, workers=1)
    rows = batches(cfg, lambda text: [len(text)], sys.argv[2])
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
