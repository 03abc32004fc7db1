# SPDX-License-Identifier: Apache-2.0
"""Trains, samples and measures every arm of the ablations; draws what comes out.

python -m benchmarks.ablations
python -m benchmarks.ablations --only spatial renoising --to runs/images
python -m benchmarks.ablations --scale full --publish

What is finished in the folder is not done again; an interrupted command is continued
by the same one. Results and figures are written into the folder, and with --publish
into benchmarks/results/ and docs/ as well.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import tables
from benchmarks.ablations import figures, plan, renoising, scenes
from benchmarks.ablations.arms import Run, run_arm
from benchmarks.ablations.plan import QUESTIONS, SCALES, Scale
from benchmarks.ablations.results import finished, results
from benchmarks.timing import plain
from launch.evaluate.reports import write_report
from launch.start import enable_compile_cache

logger = logging.getLogger("ablations")
ROOT = Path(__file__).resolve().parent.parent.parent
RUNS, SMOKE = Path("runs/ablations"), "smoke"
RENOISING = "renoising"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is asked for, and reports."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    enable_compile_cache()
    folder, scale = Path(options.to or RUNS / options.scale), SCALES[options.scale]
    if options.publish and options.scale == SMOKE:
        raise ValueError("--publish needs a scale that measures something, not smoke")
    check_folder(folder, options.scale)
    if (devices := jax.device_count()) > 1:
        raise ValueError(
            f"arms have rows for one device, there are {devices}; show one to this "
            "command, e.g. with CUDA_VISIBLE_DEVICES=0"
        )
    scenes.write_scenes(folder / "data", scale.scenes)
    for run in runs(folder, scale, options.only):
        logger.info("%s", run.name)
        run_arm(run)
    if RENOISING in options.only:
        renoise(folder, scale)
    found = results(folder, options.scale, renoised(folder))
    write_report(folder / "ablations.json", found)
    figures.draw(folder, found, folder / "figures")
    if options.publish:
        write_report(tables.RESULTS / "ablations.json", found)
        figures.draw(folder, found, ROOT / "docs" / "images")
        tables.main([])


def check_folder(folder: Path, scale: str) -> None:
    """Makes the folder of a scale.

    Raises:
        ValueError: it holds what was made at another scale.
    """
    place = folder / "scale.json"
    held = json.loads(place.read_text()) if place.exists() else scale
    if held != scale:
        raise ValueError(
            f"{folder} holds runs of scale {held!r}, not {scale!r}; give another folder"
        )
    write_report(place, scale)


def runs(folder: Path, scale: Scale, only: Sequence[str]) -> list[Run]:
    """The runs that questions need; the first seed of all arms comes first."""
    asked = [QUESTIONS[name] for name in only if name != RENOISING]
    needed = {arm for q in asked for arm in (q.baseline, *q.others)}
    if RENOISING in only or not all(map(plan.is_image, needed)):
        needed.add(plan.START)
    return [
        Run(folder, arm, seed, scale)
        for seed in scale.seeds
        for arm in plan.arms()
        if arm in needed
    ]


def renoise(folder: Path, scale: Scale) -> None:
    """Compares renoising in every model that there is."""
    run = Run(folder, plan.START, scale.seeds[0], scale)
    models = dict(renoising.EMBEDDED)
    if finished([run]):
        models["textured"] = run.model
    for name, model in models.items():
        place = folder / f"{RENOISING}-{name.replace(', ', '-')}.json"
        if place.exists():
            continue
        logger.info("%s of %s", RENOISING, name)
        shown = renoising.textured if name == "textured" else renoising.embedded
        texts, real = shown(scale.images)
        report, first = renoising.compare(model, texts, real, scale.resamples)
        np.savez(place.with_suffix(".npz"), **first)
        write_report(place, plain({"model": name} | report))


def renoised(folder: Path) -> dict[str, Any]:
    """What was found of renoising, by model."""
    reports = [json.loads(p.read_text()) for p in folder.glob(f"{RENOISING}-*.json")]
    return {report["model"]: report for report in reports}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = os.environ.get("ABLATIONS", "default")
    parser.add_argument("--to", help=f"folder of the runs; none: {RUNS}/SCALE")
    parser.add_argument(
        "--scale", default=usual, choices=SCALES, help="none: that of ABLATIONS"
    )
    every = [*QUESTIONS, RENOISING]
    parser.add_argument(
        "--only", nargs="*", default=every, choices=every, help="questions to answer"
    )
    parser.add_argument(
        "--publish", action="store_true", help="write results and figures of docs, too"
    )
    return parser


if __name__ == "__main__":
    main()
