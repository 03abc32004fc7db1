# SPDX-License-Identifier: Apache-2.0
"""Drawings of the results; each says what made it."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.ablations import measures, plan
from benchmarks.ablations.arms import Run
from benchmarks.ablations.plan import SCALES
from pyramid_jax.pyramid import RENOISING

SHOWN = 6  # images of a row
_CLIPS = ("pyramid", "sequences", "bidirectional", "full_history")


def draw(folder: Path, found: dict[str, Any], to: Path) -> list[Path]:
    """Writes every figure for which there are results; returns their paths."""
    to.mkdir(parents=True, exist_ok=True)
    drawn = {
        "ablations_images.png": learning_curves(found),
        "ablations_videos.png": bars(found),
        "ablations_clips.png": strips(folder, found),
        "ablations_renoising.png": renoising(folder, found),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(to / name, dpi=110, metadata={"Software": None})
            paths.append(to / name)
    return paths


def learning_curves(found: dict[str, Any]) -> Figure | None:
    """Fig. 7: the distance of images on the way, over arithmetic, for each seed."""
    records = [r for r in found["runs"].values() if plan.is_image(r["arm"])]
    if not records:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for record in records:
        flop = [point["flop"] / 1e12 for point in record["points"]]
        distance = [point["measures"]["frechet"] for point in record["points"]]
        colour = f"C{arms.index(record['arm'])}"
        label = _title(record["arm"]) if record["seed"] == 0 else None
        axes.plot(flop, distance, "o-", color=colour, label=label)
    axes.axhline(found["real"]["images"]["frechet"], color="grey", label="real images")
    axes.set(xlabel="training, TFLOP", ylabel="Fréchet distance", yscale="log")
    axes.legend()
    _sign(figure, records)
    return figure


def bars(found: dict[str, Any]) -> Figure | None:
    """Videos: the measures of the questions, for each arm and seed."""
    records = [r for r in found["runs"].values() if not plan.is_image(r["arm"])]
    if not records:
        return None
    names = ("frechet", "motions", "steady", "frechet_last")
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    arms = list(dict.fromkeys(record["arm"] for record in records))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        places = [arms.index(record["arm"]) for record in records]
        heights = [record["points"][-1]["measures"][name] for record in records]
        axes.plot(heights, places, "o")
        axes.axvline(found["real"]["videos"][name], color="grey")
        labels = [_title(arm) for arm in arms] if name == names[0] else []
        axes.set_yticks(range(len(arms)), labels or [""] * len(arms))
        measure = measures.MEASURES[name]
        axes.set_title(
            f"{measure.title}\n({'less' if measure.less else 'more'} is better)",
            fontsize=8,
        )
        axes.set_ylim(len(arms) - 0.5, -0.5)
    _sign(figure, records)
    return figure


def strips(folder: Path, found: dict[str, Any]) -> Figure | None:
    """Fig. 8 and 11: all frames of the first clips of some arms, with one seed."""
    scale = SCALES[found["scale"]]
    runs = [Run(folder, arm, scale.seeds[0], scale) for arm in _CLIPS]
    runs = [run for run in runs if run.name in found["runs"] and run.arrays.exists()]
    if not runs:
        return None
    figure = Figure(figsize=(11, 1.2 * len(runs) + 0.4), layout="constrained")
    grid = figure.subplots(len(runs), 1, squeeze=False)
    for axes, run in zip(grid[:, 0], runs, strict=True):
        with np.load(run.arrays) as arrays:
            clips = arrays["clips"][:3]
        axes.imshow(np.concatenate([np.concatenate(clip, axis=1) for clip in clips], 1))
        axes.set_title(_title(run.arm), fontsize=8)
        axes.axis("off")
    _sign(figure, [found["runs"][run.name] for run in runs])
    return figure


def renoising(folder: Path, found: dict[str, Any]) -> Figure | None:
    """Fig. 10: images by renoising, and their spectra."""
    reports = found["renoising"]
    if not reports:
        return None
    figure = Figure(figsize=(11, 2.6 * len(reports)), layout="constrained")
    grid = figure.subplots(
        len(reports), 2, squeeze=False, gridspec_kw={"width_ratios": [2, 1]}
    )
    for (left, right), (name, report) in zip(grid, reports.items(), strict=True):
        with np.load(folder / f"renoising-{name.replace(', ', '-')}.npz") as first:
            rows = [np.concatenate(first[kind][:SHOWN], axis=1) for kind in RENOISING]
        left.imshow(np.concatenate(rows))
        side = rows[0].shape[0]
        left.set_yticks([side * (i + 0.5) for i in range(len(rows))], RENOISING)
        left.set_xticks([])
        left.set_title(name, fontsize=8)
        for kind, row in report["rows"].items():
            style = "k--" if kind == "real" else "-"
            frequency = (np.arange(len(row["spectrum"])) + 0.5) / 32
            right.plot(frequency, row["spectrum"], style, label=kind)
        right.set_title("power, decibels, over frequency per pixel", fontsize=8)
        right.legend(fontsize=7)
    _sign(figure, list(reports.values()))
    return figure


def _title(arm: str) -> str:
    return arm.removeprefix(plan.IMAGES).replace("_", " ")


def _sign(figure: Figure, records: list[dict[str, Any]]) -> None:
    """Says what made a figure: seeds, commits, devices, date."""
    parts = {
        "seed": sorted({str(record["seed"]) for record in records}),
        "commit": sorted({record["commit"] for record in records}),
        "device": sorted({f"{r['device']}, {r['cpu']}" for r in records}),
        "date": sorted({record["date"] for record in records}),
    }
    text = "; ".join(f"{name} {', '.join(found)}" for name, found in parts.items())
    figure.supxlabel(text, fontsize=6, color="grey")
