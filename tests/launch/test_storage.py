# SPDX-License-Identifier: Apache-2.0
"""Stored latents are those of their files, each made once."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from launch.prepare.storage import LatentJob, latent_path, write_latents
from pyramid_jax.data.examples import stored_latent
from pyramid_jax.data.manifest import Record, read_manifest, write_manifest
from pyramid_jax.data.source import read_pixels
from pyramid_jax.data.stored import MADE_WITH, check_latents, read_latent
from pyramid_jax.data.video_io import write_video
from pyramid_jax.latents import LatentConfig

LATENT = LatentConfig(4, 8, 2, 1.0, 2.0, 3.0, 4.0)
SIZE, FRAMES = (16, 24), 5


class Encoder:
    """Mean colours of cells as latents, and the record's number; counts its calls."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __call__(self, pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        self.batches.append(numbers.tolist())
        cells = pixels[:, ::2].reshape(len(pixels), -1, 2, 8, 3, 8, 3)
        means = cells.astype(np.float32).mean(axis=(3, 5))
        number = np.broadcast_to(
            numbers[:, None, None, None, None], (*means.shape[:-1], 1)
        )
        return np.concatenate([means, number], axis=-1)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three videos, the last named twice, and an image."""
    random = np.random.default_rng(0)
    records = []
    for i in range(3):
        video = np.full((FRAMES, *SIZE, 3), 40 * i + 20, np.uint8)
        write_video(tmp_path / f"{i}.mp4", video, 8)
        records.append(Record(tmp_path / f"{i}.mp4", "video", f"clip {i}"))
    imsave(tmp_path / "i.png", random.integers(0, 256, (*SIZE, 3), np.uint8))
    records.append(Record(tmp_path / "2.mp4", "video", "the same clip"))
    records.append(Record(tmp_path / "i.png", "image", "a picture"))
    write_manifest(tmp_path / "manifest.jsonl", records)
    return tmp_path / "manifest.jsonl"


def job(encode: Encoder, **options) -> LatentJob:
    load = partial(read_pixels, frames=FRAMES, fps=8)
    made_with = {"frames": FRAMES, "fps": 8.0}
    choices = {"batch": 2, "max_bad": 0.5} | options
    return LatentJob(encode, load, (SIZE,), made_with, **choices)


def test_every_record_gets_the_latent_of_its_file(manifest: Path, tmp_path: Path):
    encode = Encoder()
    made = write_latents(manifest, tmp_path / "latents", job(encode))
    records = read_manifest(made)
    assert [r.text for r in records] == [r.text for r in read_manifest(manifest)]
    for number, record in enumerate(records[:3]):
        latent = read_latent(record.latent)
        assert latent.shape == (3, 2, 3, 4)
        np.testing.assert_array_equal(latent[..., 3], number)
        np.testing.assert_allclose(latent[..., :3], 40 * number + 20, atol=3)
    assert records[3].latent == records[2].latent
    assert read_latent(records[4].latent).shape == (1, 2, 3, 4)


def test_batches_have_one_size_and_no_file_is_encoded_twice(manifest, tmp_path):
    encode = Encoder()
    write_latents(manifest, tmp_path / "latents", job(encode))
    assert encode.batches == [[0, 1], [2, 2], [4, 4]]


def test_an_interrupted_run_goes_on_where_it_stopped(manifest: Path, tmp_path: Path):
    folder, encode = tmp_path / "latents", Encoder()
    write_latents(manifest, folder, job(Encoder()))
    latent_path(folder, tmp_path / "1.mp4").unlink()
    write_latents(manifest, folder, job(encode))
    assert encode.batches == [[1, 1]]


def test_a_file_that_was_replaced_is_encoded_again(manifest: Path, tmp_path: Path):
    folder = tmp_path / "latents"
    write_latents(manifest, folder, job(Encoder()))
    write_video(tmp_path / "1.mp4", np.full((FRAMES, *SIZE, 3), 200, np.uint8), 8)
    encode = Encoder()
    made = write_latents(manifest, folder, job(encode))
    assert encode.batches == [[1, 1]]
    latent = read_latent(read_manifest(made)[1].latent)
    np.testing.assert_allclose(latent[..., :3], 200, atol=3)


def test_a_latent_outlives_its_file(manifest: Path, tmp_path: Path):
    folder, encode = tmp_path / "latents", Encoder()
    write_latents(manifest, folder, job(Encoder()))
    (tmp_path / "1.mp4").unlink()
    assert len(read_manifest(write_latents(manifest, folder, job(encode)))) == 5
    assert not encode.batches


@pytest.mark.parametrize("frames", [3, 5])
def test_latents_made_with_something_else_are_refused(manifest, tmp_path, frames):
    folder, encode = tmp_path / "latents", Encoder()
    write_latents(manifest, folder, job(Encoder()))
    other = replace(job(encode), sizes=((16, 16),))
    if frames != FRAMES:
        other = replace(other, sizes=(SIZE,), made_with={"frames": frames, "fps": 8.0})
    with pytest.raises(ValueError, match=r"(frames 5, not 3|sizes .*); wr"):
        write_latents(manifest, folder, other)
    assert not encode.batches


def test_latents_that_do_not_say_what_made_them_are_refused(manifest, tmp_path):
    folder = tmp_path / "latents"
    write_latents(manifest, folder, job(Encoder()))
    (folder / MADE_WITH).unlink()
    with pytest.raises(ValueError, match=r"no made_with\.json that says what made"):
        write_latents(manifest, folder, job(Encoder()))


def test_names_do_not_depend_on_the_working_folder(manifest, tmp_path, monkeypatch):
    encode = Encoder()
    write_latents(manifest, tmp_path / "latents", job(Encoder()))
    monkeypatch.chdir(tmp_path)
    write_latents("manifest.jsonl", "latents", job(encode))
    assert not encode.batches
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 4


def test_latents_that_are_not_finite_are_listed_instead(manifest: Path, tmp_path: Path):
    class Broken(Encoder):
        def __call__(self, pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
            latents = super().__call__(pixels, numbers).copy()
            latents[numbers == 1, 0, 0, 0] = 1e30  # too large for float16
            return latents

    made = write_latents(manifest, tmp_path / "latents", job(Broken()))
    assert [record.path.name for record in read_manifest(made)] == [
        *("0.mp4", "2.mp4", "2.mp4", "i.png")
    ]
    (line,) = (tmp_path / "latents" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "path": str(tmp_path / "1.mp4"),
        "reason": "its latent is not finite in float16",
    }


def test_unusable_files_are_left_out_and_listed(manifest: Path, tmp_path: Path):
    (tmp_path / "1.mp4").write_bytes(b"nothing")
    made = write_latents(manifest, tmp_path / "latents", job(Encoder()))
    assert len(read_manifest(made)) == 4
    listed = (tmp_path / "latents" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == [str(tmp_path / "1.mp4")]
    with pytest.raises(ValueError, match="raise max_bad"):
        write_latents(manifest, tmp_path / "other", job(Encoder(), max_bad=0.0))


def test_latents_do_not_replace_the_manifest_they_are_made_from(manifest: Path):
    with pytest.raises(ValueError, match="holds the manifest itself"):
        write_latents(manifest, manifest.parent, job(Encoder()))


def test_a_missing_latent_is_an_error_with_advice(tmp_path: Path):
    with pytest.raises(ValueError, match=r"can't read latent of .* prepare it"):
        read_latent(tmp_path / "none.safetensors")


# ------------------------------------------------------------------------ for training


def test_training_reads_normalised_latents_of_its_length(manifest, tmp_path):
    made = write_latents(manifest, tmp_path / "latents", job(Encoder()))
    record = read_manifest(made)[1]
    raw = read_latent(record.latent)
    loaded = stored_latent(LATENT, 2, record, (SIZE,))
    np.testing.assert_array_equal(loaded, LATENT.normalise(raw[:2]))
    assert loaded.dtype == np.float32


def test_latents_of_another_rate_or_vae_are_refused(manifest, tmp_path):
    made_with = {"frames": FRAMES, "fps": 8.0, "vae": "one"}
    made = write_latents(
        manifest, tmp_path / "latents", replace(job(Encoder()), made_with=made_with)
    )
    records = read_manifest(made)
    check_latents(records, fps=8, vae="one")
    for wanted in ({"fps": 24.0, "vae": "one"}, {"fps": 8.0, "vae": "other"}):
        with pytest.raises(ValueError, match=r"were made with (fps|vae).*, not"):
            check_latents(records, **wanted)


@pytest.mark.parametrize(("frames", "size"), [(4, SIZE), (2, (16, 16))])
def test_latents_of_another_size_are_refused(manifest, tmp_path, frames, size):
    made = write_latents(manifest, tmp_path / "latents", job(Encoder()))
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 3, 4\), expected"):
        stored_latent(LATENT, frames, read_manifest(made)[0], (size,))
