# SPDX-License-Identifier: Apache-2.0
"""Shards: several processes, one of which was killed, write every record once."""

import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.prepare.__main__ import shard_of
from launch.prepare.shards import without_cuts, write_shard
from launch.prepare.storage import LatentJob
from pyramid_jax.data.examples import stored_latent
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.shards import Shards
from pyramid_jax.data.stored import (
    EMPTY,
    check_features,
    check_latents,
    read_records,
    stored_features,
)
from pyramid_jax.latents import LatentConfig
from tests.conftest import ROOT

LATENT = LatentConfig(3, 1, 1, 0.0, 1.0, 0.0, 1.0)
SIZE, COUNT = (4, 6), 11


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Videos that are never opened, with features of their captions."""
    folder = tmp_path / "text"
    folder.mkdir()
    names = [EMPTY, *(f"{i}.safetensors" for i in range(COUNT))]
    for number, name in enumerate(names):
        tokens = np.full((2, 3), number, ml_dtypes.bfloat16)
        save_file({"tokens": tokens, "pooled": tokens[:1]}, folder / name)
    records = [
        Record(tmp_path / f"{i}.mp4", "video", f"clip {i}", folder / name)
        for i, name in enumerate(names[1:])
    ]
    return write_manifest(tmp_path / "manifest.jsonl", records)


def load(record: Record, size: tuple[int, int]) -> np.ndarray:
    return np.full((2, *size, 3), int(record.path.stem), np.uint8)


def encode(made: list[int], stop: int, pixels: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Pixels as latents; is killed at the batch with a video."""
    numbers = pixels[:, 0, 0, 0, 0].tolist()
    if stop in numbers:
        raise KeyboardInterrupt
    made += numbers
    return pixels.astype(np.float32)


def job(made: list[int], stop: int = -1) -> LatentJob:
    return LatentJob(
        partial(encode, made, stop), load, (SIZE,), {"fps": 8.0}, workers=0
    )


def test_a_killed_shard_is_completed_without_doubles_or_losses(
    manifest: Path, tmp_path: Path
):
    folder, made = tmp_path / "shards", []
    with pytest.raises(KeyboardInterrupt):
        write_shard(manifest, folder, job(made, stop=5), (1, 2), piece=2)
    assert made == [1, 3]
    write_shard(manifest, folder, job(made), (0, 2), piece=2)
    with pytest.raises(
        ValueError, match=r"lacks 1 of 2 shards, \['00001-of-00002.json"
    ):
        read_records(folder)
    write_shard(manifest, folder, job(made), (1, 2), piece=2)
    write_shard(manifest, folder, job(made), (1, 2), piece=2)  # nothing is left
    assert sorted(made) == list(range(COUNT))

    records = read_records(folder)
    assert isinstance(records, Shards)
    assert sorted(record.text for record in records) == sorted(
        f"clip {i}" for i in range(COUNT)
    )
    check_features(records)
    check_latents(records, fps=8.0)
    with pytest.raises(ValueError, match=r"fps 8\.0, not 9\.0"):
        check_latents(records, fps=9.0)
    for record in pickle.loads(pickle.dumps(records)):
        number = int(record.path.stem)
        latent = stored_latent(LATENT, 2, record, (SIZE, (6, 4)))
        np.testing.assert_array_equal(latent, np.full((2, *SIZE, 3), number))
        words = stored_features(record, dropped=False).tokens
        np.testing.assert_array_equal(words, np.full((2, 3), number + 1))
        assert not stored_features(record, dropped=True).tokens.any()


PREPARE = """
import sys, time
from launch.prepare.shards import write_shard
from launch.prepare.storage import LatentJob
from tests.launch.test_shards import SIZE, load

manifest, folder, index, stop = sys.argv[1:]

def encode(pixels, _):
    number = pixels[0, 0, 0, 0, 0]
    print(number, flush=True)
    time.sleep(600 if number == int(stop) else 0)
    return pixels.astype("float32")

job = LatentJob(encode, load, (SIZE,), {"fps": 8.0}, workers=0)
write_shard(manifest, folder, job, (int(index), 2), piece=2)
"""


@pytest.mark.slow  # three processes, each of which imports everything
def test_of_two_processes_one_is_killed_and_started_again(
    manifest: Path, tmp_path: Path
):
    folder = tmp_path / "shards"

    def process(index: int, stop: int = -1) -> subprocess.Popen[str]:
        arguments = map(str, (manifest, folder, index, stop))
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    first, second = process(0), process(1, stop=7)
    assert second.stdout is not None
    assert [int(next(second.stdout)) for _ in range(4)] == [1, 3, 5, 7]
    second.kill()  # in the middle of its second piece
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 0 and said.split() == ["0", "2", "4", "6", "8", "10"]
    again = process(1)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and said.split() == ["5", "7", "9"]
    texts = [record.text for record in read_records(folder)]
    assert sorted(texts) == sorted(f"clip {i}" for i in range(COUNT))


def test_unusable_files_are_left_out_and_listed(manifest: Path, tmp_path: Path):
    def broken(pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return np.where(numbers[:, None, None, None, None] == 2, np.inf, pixels)

    folder, half = tmp_path / "shards", job([])
    half = LatentJob(broken, half.load, half.sizes, {}, max_bad=0.5, workers=0)
    write_shard(manifest, folder, half, (0, 1), piece=1)
    assert len(read_records(folder)) == COUNT - 1
    assert "not finite" in (folder / "00000-of-00001/skipped.jsonl").read_text()


def test_a_damaged_piece_is_a_record_that_can_not_be_read(
    manifest: Path, tmp_path: Path
):
    folder = tmp_path / "shards"
    write_shard(manifest, folder, job([]), (0, 1))
    (folder / "00000-of-00001/000000.array_record").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="write the shard again"):
        Shards(folder)[3]


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 99)])
def test_shards_that_can_not_be_are_refused(
    shard: tuple[int, int], manifest: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="shard"):
        write_shard(manifest, tmp_path / "shards", job([]), shard)


def test_cuts_are_found():
    video = np.zeros((4, 8, 8, 3), np.uint8)
    video[2:] = 200
    with pytest.raises(ValueError, match="between its frames 1 and 2 pixels change by"):
        without_cuts(video, 60)
    assert without_cuts(video, 250) is video
    assert without_cuts(video[:1], 0).shape[0] == 1


def test_shards_are_named_by_index_and_count():
    assert shard_of("3/8") == (3, 8)
    with pytest.raises(ValueError, match=r"--shard=3 is not INDEX/COUNT"):
        shard_of("3")
