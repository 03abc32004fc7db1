# SPDX-License-Identifier: Apache-2.0
"""Anybody's clips: a folder of them is measured, and compared with real ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8
from tqdm import tqdm

from launch import start
from launch.evaluate import metrics
from launch.evaluate.distances import FEW, frechet, jedi, spectrum_distance
from launch.evaluate.metrics import Clip, ClipMetrics
from launch.evaluate.reports import write_report
from launch.pairs.judge import clip_features
from pyramid_jax.data import video_io
from pyramid_jax.shapes import Array
from pyramid_jax.vae import quality

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
FEATURES = ".npy"

_SIDE, _STEP = 64, 8  # pixels: what the judge knows, and sizes that it takes
_RESAMPLED, _SEED = 2000, 0  # of bootstrapped intervals


class MeasuredClips(NamedTuple):
    """The clips of a folder: of each its name, metrics, spectrum and features."""

    names: list[str]
    metrics: list[ClipMetrics]
    spectra: list[Float[np.ndarray, "bins"]]
    features: Float[np.ndarray, "n d"]


def evaluate_clips(options: flags.FlagValues) -> None:
    """Prints a table of a folder's clips, and maybe of those that they are compared to.

    Raises:
        ValueError: folders without clips, clips that can't be read, or nothing to
            compare with.
    """
    videos, against = options.videos, options.against
    if options.paired and not against:
        raise ValueError(
            "--paired compares clips of one name; give the folder of the others with "
            "--against"
        )
    if options.to:
        start.check_writable(Path(options.to).parent)
    if Path(videos).suffix == FEATURES:
        if not against:
            raise ValueError(
                f"{videos} has features, which are measured against others only; give "
                "theirs with --against"
            )
        report = distances(read_features(videos), read_features(against))
        print(distance_table(report))
    else:
        report = folder_report(Path(videos), Path(against) if against else None)
        if options.paired:
            report["paired"] = paired_quality(Path(videos), Path(against))
        print(clip_table(report))
    if options.to:
        write_report(options.to, {"videos": videos, "against": against} | report)


def folder_report(videos: Path, against: Path | None = None) -> dict[str, Any]:
    """What is measured of a folder, and of a second one, as JSON."""
    made = measured(videos)
    report: dict[str, Any] = {
        "opencv": metrics.opencv().__version__,
        "clips": rows(made),
        "mean": means(made.metrics),
    }
    if against is not None:
        real = measured(against)
        report["mean_against"] = means(real.metrics)
        report |= distances(made.features, real.features)
        report["spectrum"] = spectrum_distance(made.spectra, real.spectra)
        if len(real.names) >= 2:
            odd, even = real.spectra[::2], real.spectra[1::2]
            report["spectrum_floor"] = spectrum_distance(odd, even)
    return report


def measured(folder: Path) -> MeasuredClips:
    """Measures every clip of a folder, in the order of their names."""
    names, metric, spectra, features = [], [], [], []
    for path in tqdm(clip_files(folder), desc=folder.name, disable=None):
        clip, fps = read_clip(path)
        try:
            metric.append(metrics.measure(clip, fps))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; leave it out") from error
        names.append(path.name)
        spectra.append(metrics.spectrum(clip))
        features.append(clip_features([for_judge(clip)])[0])
    return MeasuredClips(names, metric, spectra, np.stack(features))


def clip_files(folder: Path) -> list[Path]:
    """The clips of a folder, by their suffixes.

    Raises:
        ValueError: there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; correct the path")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"{folder} holds no clip; give a folder with files that end with "
            f"{', '.join(SUFFIXES)}"
        )
    return sorted(paths)


def read_clip(path: Path) -> tuple[Clip, float]:
    """All frames of a file as OpenCV reads them, as evaluators do, and their rate.

    Colours depend on OpenCV's version; `video_io` reads them as players show them.

    Raises:
        ValueError: a missing or broken file.
    """
    fps, cv2 = video_io.video_info(path).fps, metrics.opencv()
    reader, frames = cv2.VideoCapture(str(path)), []
    while (found := reader.read())[0]:
        frames.append(found[1][..., ::-1])
    reader.release()
    if not frames:
        raise ValueError(f"{path} can't be read by OpenCV; write an H.264 mp4 file")
    return np.stack(frames), fps


def for_judge(clip: Clip) -> Clip:
    """A clip in a size that the judge of bouncing pairs knows, 64 pixels or longer."""
    height, width = clip.shape[1:3]
    scale = _SIDE / min(height, width)
    size = [max(1, round(side * scale / _STEP)) * _STEP for side in (height, width)]
    return metrics.resized(clip, size[0], size[1])


def read_features(path: str | Path) -> Float[np.ndarray, "n d"]:
    """Features in an .npy file, a row for each clip.

    Raises:
        ValueError: another kind of file or array.
    """
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as an .npy file ({error})") from error
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(
            f"{path} has an array of shape {features.shape}, expected finite numbers "
            "with a row for each clip"
        )
    return features.astype(np.float64)


def distances(
    made: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m e"]
) -> dict[str, Any]:
    """Distances of two sets of features, and of the halves of the second: the floor.

    Raises:
        ValueError: too few rows, or rows of different lengths.
    """
    if min(len(made), len(real)) < FEW or made.shape[1] != real.shape[1]:
        raise ValueError(
            f"features of shapes {made.shape} and {real.shape}: distances need "
            f"{FEW} clips or more on both sides, and rows of one length"
        )
    report: dict[str, Any] = {"frechet": frechet(made, real), "jedi": jedi(made, real)}
    odd, even = real[::2], real[1::2]
    if len(even) >= FEW:
        report["frechet_floor"] = frechet(odd, even)
        report["jedi_floor"] = jedi(odd, even)
    return report


@jax.jit
def similarity(
    a: UInt8[Array, "h w 3"], b: UInt8[Array, "h w 3"]
) -> Float[jax.Array, "2"]:
    """PSNR and SSIM of two frames."""
    one, other = (x.astype(jnp.float32) / 127.5 - 1 for x in (a, b))
    return jnp.stack([quality.psnr(one, other), quality.ssim(one, other)])


def paired_quality(videos: Path, against: Path) -> dict[str, float | None]:
    """Mean PSNR and SSIM of clips that have the same name in both folders.

    PSNR is None if two clips are equal, where it has no end.

    Raises:
        ValueError: no name is in both, or clips of a name differ in size.
    """
    others = {path.name: path for path in clip_files(against)}
    both = [path for path in clip_files(videos) if path.name in others]
    if not both:
        raise ValueError(
            f"no clip of {videos} has the name of one of {against}; paired clips do"
        )
    scores = []
    for path in both:
        a, b = read_clip(path)[0], read_clip(others[path.name])[0]
        if a.shape != b.shape:
            raise ValueError(
                f"{path} has frames, height and width {a.shape[:3]}, the clip of that "
                f"name in {against} has {b.shape[:3]}; expected equal ones"
            )
        frames = [similarity(*pair) for pair in zip(a, b, strict=True)]
        scores.append(np.mean(frames, axis=0))
    psnr, ssim = np.mean(scores, axis=0).tolist()
    psnr = psnr if math.isfinite(psnr) else None
    return {"clips": len(both), "psnr": psnr, "ssim": ssim}


# ----------------------------------------------------------------------------- tables


def rows(clips: MeasuredClips) -> dict[str, dict[str, float]]:
    """The metrics of every clip by its name."""
    pairs = zip(clips.names, clips.metrics, strict=True)
    return {name: metric._asdict() for name, metric in pairs}


def means(values: Sequence[ClipMetrics]) -> dict[str, tuple[float, float, float]]:
    """The mean of every metric, and its 95 % interval."""
    columns = np.array(values).T
    return {
        name: (float(column.mean()), *interval(column))
        for name, column in zip(ClipMetrics._fields, columns, strict=True)
    }


def interval(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """The 95 % interval of a mean, bootstrapped over clips."""
    rng = np.random.default_rng(_SEED)
    draws = rng.integers(0, len(values), (_RESAMPLED, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5]).tolist()
    return low, high


def clip_table(report: dict[str, Any]) -> str:
    """A report of a folder as Markdown."""
    columns = {f"{len(report['clips'])} clips": report["mean"]}
    if "mean_against" in report:
        columns["against"] = report["mean_against"]
    lines = [f"| mean | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ClipMetrics._fields:
        cells = (
            "{:.4f} ({:.4f} to {:.4f})".format(*column[name])
            for column in columns.values()
        )
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    if "frechet" in report:
        text += "\n\n" + distance_table(report)
    if paired := report.get("paired"):
        psnr = paired["psnr"]
        decibels = "infinite" if psnr is None else f"{psnr:.2f} dB"
        text += f"\n\n{paired['clips']} pairs: PSNR {decibels}, "
        text += f"SSIM {paired['ssim']:.4f}"
    return text


def distance_table(report: dict[str, Any]) -> str:
    """Distances as Markdown, beside those of the real clips' halves."""
    lines = ["| distance | to real clips | between their halves |", "|---|---|---|"]
    for name in ("frechet", "jedi", "spectrum"):
        if name in report:
            floor = report.get(f"{name}_floor", math.nan)
            lines.append(f"| {name} | {report[name]:.4f} | {floor:.4f} |")
    return "\n".join(lines)
