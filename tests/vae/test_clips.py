# SPDX-License-Identifier: Apache-2.0
"""Batches of clips: what is in them, what is held out, and how they are resumed."""

import itertools
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.pictures import write_picture
from pyramid_jax.data.video_io import read_video, write_video
from pyramid_jax.vae.clips import Footage, VAEDataConfig, vae_batches
from tests.packed import SIZE, write_clips


def config(folder: Path, records: list[Record], **changes) -> VAEDataConfig:
    """Clips of 3 of the 4 frames of each file."""
    write_manifest(folder / "manifest.jsonl", records)
    cfg = VAEDataConfig(folder / "manifest.jsonl", *SIZE, frames=3, fps=8, batch=2)
    return replace(cfg, **changes)


def take(count: int, cfg: VAEDataConfig, **options) -> list[Footage]:
    folder = Path(cfg.manifest).parent
    with closing(vae_batches(cfg, folder, **options)) as iterator:
        return list(itertools.islice(iterator, count))


def shades(taken: list[Footage]) -> list[int]:
    """Which files the clips come from, in order; file i is all of the grey 20i + 20."""
    clips = [clip for footage in taken for clip in footage.video]
    return [round((float(clip.mean()) - 20) / 20) for clip in clips]


def moving(path: Path) -> Record:
    """A video of 8 frames, each brighter than the one before."""
    frames = np.arange(20, 180, 20, dtype=np.uint8)
    video = np.broadcast_to(frames[:, None, None, None], (8, *SIZE, 3))
    write_video(path, np.ascontiguousarray(video), 8, crf=1)
    return Record(path, "video", "it brightens")


def test_a_batch_holds_clips_of_the_files_in_8_bits(tmp_path):
    records = write_clips(tmp_path, 5)
    taken = take(5, config(tmp_path, records))
    for footage in taken:
        assert footage.image is None
        assert footage.video.shape == (2, 3, *SIZE, 3)
        assert footage.video.dtype == np.uint8
    assert sorted(shades(taken)[:5]) == sorted(shades(taken)[5:]) == [0, 1, 2, 3, 4]
    expected = read_video(records[shades(taken)[0]].path, SIZE, 3, 8)
    np.testing.assert_array_equal(taken[0].video[0], expected)


def test_held_out_records_are_the_last_ones_and_are_not_trained_on(tmp_path):
    cfg = config(tmp_path, write_clips(tmp_path, 6), held_out=2)
    assert set(shades(take(6, cfg))) == {0, 1, 2, 3}
    assert set(shades(take(6, cfg, split="held out"))) == {4, 5}


def test_pictures_are_images_where_the_manifest_has_some(tmp_path):
    clips = write_clips(tmp_path, 2)
    write_picture(tmp_path / "a.png", np.full((*SIZE, 3), 20, np.uint8))
    stills = [Record(tmp_path / "a.png", "image", "it is dark")]
    for records, found in ((clips, {0, 1}), (clips[1:] + stills, {0})):
        taken = take(4, config(tmp_path, records, images=3))
        assert taken[0].image is not None
        assert taken[0].image.shape == (3, 1, *SIZE, 3)
        pictures = [Footage(footage.image) for footage in taken]
        assert set(shades(pictures)) == found
    assert set(shades(taken)) == {1}


def test_clips_begin_in_windows_from_the_start_to_the_end_of_a_file(tmp_path):
    cfg = config(tmp_path, [moving(tmp_path / "a.mp4")], windows=3, batch=12)
    (footage,) = take(1, cfg)
    brightness = footage.video.mean(axis=(2, 3, 4))
    begins = np.round(brightness[:, 0] / 20).astype(int) - 1
    assert set(begins.tolist()) == {0, 2, 5}
    np.testing.assert_allclose(np.diff(brightness, axis=1), 20, atol=2)


def test_a_run_resumes_exactly_where_it_stopped(tmp_path):
    records = [*write_clips(tmp_path, 5), moving(tmp_path / "b.mp4")]
    cfg = config(tmp_path, records, images=1, windows=2)
    with (
        closing(vae_batches(cfg, tmp_path)) as a,
        closing(vae_batches(cfg, tmp_path)) as b,
    ):
        for _ in range(3):
            next(a)
        b.set_state(json.loads(json.dumps(a.get_state())))
        for _ in range(5):
            jax.tree.map(np.testing.assert_array_equal, next(a), next(b))


def test_hosts_divide_the_clips_among_them(tmp_path):
    cfg = config(tmp_path, write_clips(tmp_path, 6), batch=6, images=2)
    (whole,) = take(1, cfg)
    halves = [take(1, cfg, rows=x)[0] for x in (([0, 1, 2], [0]), ([3, 4, 5], [1]))]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)
    assert sorted(shades([whole])) == [0, 1, 2, 3, 4, 5]


def test_a_bad_file_is_skipped_and_listed(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    records = [*write_clips(tmp_path, 3), Record(broken, "video", "nothing")]
    cfg = config(tmp_path, records, max_bad=0.25)
    assert set(shades(take(4, cfg))) == {0, 1, 2}
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(broken)
    with pytest.raises(ValueError, match="1 of 4 files"):
        take(4, replace(cfg, max_bad=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch 0 must be over 0"),
        ({"windows": 0}, "windows 0 must be over 0"),
        ({"images": -1}, "images -1 must be 0 or more"),
        ({"max_bad": 2.0}, "max_bad 2.0 must be 0 to 1"),
        ({"held_out": 2}, "held_out 2 leaves nothing of the 2 records"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        take(1, config(tmp_path, write_clips(tmp_path, 2), **changes))


def test_a_manifest_without_videos_is_refused(tmp_path):
    images = [Record(tmp_path / "a.png", "image", "a picture")]
    with pytest.raises(ValueError, match="has no video among its 1 records"):
        take(1, config(tmp_path, images))
