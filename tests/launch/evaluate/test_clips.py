# SPDX-License-Identifier: Apache-2.0
"""Folders of anybody's clips are measured, compared, and refused with a reason."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import __main__, clips, metrics
from launch.pairs.dataset import pair
from launch.pairs.scene import Settings
from pyramid_jax.data.video_io import write_video

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def films() -> list[np.ndarray]:
    settings = Settings(frames=6)
    drawn = (pair(i, 6, "held out", settings, "video") for i in range(12))
    return [each.pixels[:, :, :64] for each in drawn]


def blurred(clip: np.ndarray) -> np.ndarray:
    height, width = clip.shape[1:3]
    small = metrics.resized(clip, height // 4, width // 4)
    return metrics.resized(small, height, width)


def written(folder: Path, pixels: list[np.ndarray]) -> Path:
    for i, clip in enumerate(pixels):
        write_video(folder / f"{i}.mp4", clip, 8.0, crf=12)
    return folder


@pytest.fixture(scope="module")
def real(films: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("clips") / "real", films[:6])


@pytest.fixture(scope="module")
def soft(films: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "soft"
    return written(folder, [blurred(clip) for clip in films[:6]])


@pytest.fixture(scope="module")
def others(films: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("clips") / "others", films[6:])


def test_a_folder_becomes_a_table_and_json(given, real: Path, tmp_path: Path, capsys):
    to = tmp_path / "numbers.json"
    (real / "notes.txt").write_text("is no clip")
    __main__.evaluate(given(f"--videos={real}", f"--to={to}"))
    table = capsys.readouterr().out
    report = json.loads(to.read_text())
    assert list(report["clips"]) == [f"{i}.mp4" for i in range(6)]
    assert report["videos"] == str(real) and report["opencv"]
    for name in metrics.ClipMetrics._fields:
        values = [clip[name] for clip in report["clips"].values()]
        mean, low, high = report["mean"][name]
        assert mean == pytest.approx(np.mean(values)) and low <= mean <= high
        line = f"| {name.replace('_', ' ')} | {mean:.4f} ({low:.4f} to {high:.4f}) |"
        assert line in table


def test_damaged_clips_are_farther_from_real_ones_than_others_are(
    real: Path, soft: Path, others: Path
):
    report, floor = (clips.folder_report(x, others) for x in (soft, real))
    for name in ("frechet", "jedi", "spectrum"):
        assert report[name] > floor[name] > 0
        assert report[f"{name}_floor"] > 0
    assert report["mean"]["sharpness"][0] < 0.8 * report["mean_against"]["sharpness"][0]
    table = clips.clip_table(report)
    assert "| mean | 6 clips | against |" in table and "| jedi | " in table


def test_paired_clips_have_psnr_and_ssim(given, real: Path, soft: Path, capsys):
    quality = clips.paired_quality(soft, real)
    errors = []
    for i in range(6):
        a, b = (clips.read_clip(x / f"{i}.mp4")[0].astype(float) for x in (real, soft))
        error = np.square(a - b).mean(axis=(1, 2, 3))
        errors.append((10 * np.log10(255**2 / error)).mean())
    assert quality["psnr"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert quality["clips"] == 6 and 0.3 < (quality["ssim"] or 0) < 0.98

    equal = clips.paired_quality(real, real)
    assert equal == {"clips": 6, "psnr": None, "ssim": pytest.approx(1, abs=1e-4)}
    arguments = [f"--videos={real}", f"--against={real}", "--paired"]
    __main__.evaluate(given(*arguments))
    assert "6 pairs: PSNR infinite, SSIM 1.0000" in capsys.readouterr().out


def test_features_of_any_network_are_compared(given, tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    paths = tmp_path / "made.npy", tmp_path / "real.npy"
    for path, spread in zip(paths, (2.0, 1.0), strict=True):
        np.save(path, rng.normal(0, spread, (50, 3)).astype(np.float32))
    arguments = [f"--videos={paths[0]}", f"--against={paths[1]}"]
    __main__.evaluate(given(*arguments, f"--to={tmp_path / 'numbers.json'}"))
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert report["frechet"] > 2 * report["frechet_floor"] > 0
    assert report["jedi"] > 2 * report["jedi_floor"] > 0
    assert "| frechet |" in capsys.readouterr().out


def test_frames_reach_the_judge_in_a_size_that_it_knows():
    for shape, expected in (
        ((64, 96), (64, 96)),
        ((32, 32), (64, 64)),
        ((384, 640), (64, 104)),
        ((90, 64), (88, 64)),
    ):
        clip = np.zeros((2, *shape, 3), np.uint8)
        assert clips.for_judge(clip).shape == (2, *expected, 3)


# -------------------------------------------------------------------------- is refused


def test_folders_without_clips_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no clip; give a folder with files"):
        clips.clip_files(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        clips.clip_files(tmp_path / "missing")


def test_broken_and_short_clips_are_named(films: list[np.ndarray], tmp_path: Path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be decoded"):
        clips.measured(tmp_path)
    path.unlink()
    written(tmp_path, [films[0][:2]])
    with pytest.raises(ValueError, match=r"0\.mp4: 2 frames .*; leave it out"):
        clips.measured(tmp_path)


def test_pairs_must_exist_and_have_one_size(
    given, films: list[np.ndarray], real: Path, tmp_path: Path
):
    other = written(tmp_path / "other", [films[0][:4]])
    with pytest.raises(ValueError, match=r"has frames, height and width .*4, 64, 64"):
        clips.paired_quality(other, real)
    (other / "0.mp4").rename(other / "x.mp4")
    with pytest.raises(ValueError, match="has the name of one of"):
        clips.paired_quality(other, real)
    with pytest.raises(ValueError, match="--paired compares clips of one name"):
        __main__.evaluate(given(f"--videos={real}", "--paired"))


@pytest.mark.parametrize(
    ("array", "reason"),
    [(np.zeros(3), "a row for each clip"), (np.full((3, 3), np.nan), "finite numbers")],
)
def test_other_arrays_are_no_features(array, reason: str, tmp_path: Path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=reason):
        clips.read_features(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_text("text")
    with pytest.raises(ValueError, match=r"can't be read as an \.npy file"):
        clips.read_features(tmp_path / "b.npy")


def test_features_need_others_of_their_length(given, tmp_path: Path):
    with pytest.raises(ValueError, match="against others only"):
        __main__.evaluate(given(f"--videos={tmp_path / 'a.npy'}"))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        clips.distances(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="2 clips or more on both sides"):
        clips.distances(np.zeros((1, 3)), np.zeros((5, 3)))


def test_jobs_exclude_each_other(given, real: Path):
    with pytest.raises(ValueError, match=r"--videos and --suite are different jobs"):
        __main__.evaluate(given(f"--videos={real}", "--suite=vbench"))


@pytest.mark.parametrize(
    ("flag", "job"), [("--against=x", "videos"), ("--dry_run", "suite")]
)
def test_flags_of_a_job_that_is_not_given_are_refused(given, flag: str, job: str):
    with pytest.raises(ValueError, match=f"belongs to --{job}, which is missing"):
        __main__.evaluate(given(flag))


def test_a_missing_library_is_a_mistake_of_one_line(given, real: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    metrics.opencv.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'pyramid_jax\[evaluate\]'"):
        __main__.evaluate(given(f"--videos={real}"))
