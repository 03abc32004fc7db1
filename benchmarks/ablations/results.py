# SPDX-License-Identifier: Apache-2.0
"""From the records of arms to answers, as one JSON object."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations import arms, measures, plan
from benchmarks.ablations.arms import Run
from benchmarks.ablations.plan import QUESTIONS, SCALES, Question, Scale
from benchmarks.timing import plain


def results(folder: Path, name: str, renoised: dict[str, Any]) -> dict[str, Any]:
    """Everything that tables and figures show, of the runs that are finished."""
    scale = SCALES[name]
    runs = [
        Run(folder, arm, seed, scale) for arm in plan.arms() for seed in scale.seeds
    ]
    records = {run.name: json.loads(run.record.read_text()) for run in finished(runs)}
    return {
        "scale": name,
        "captions": {"images": scale.images, "videos": scale.videos},
        "runs": records,
        "real": {
            kind: arms.real_values(arm, scale)
            for kind, arm in (("images", plan.IMAGES), ("videos", "pyramid"))
        },
        "answers": plain(
            {key: answers(asked, folder, scale) for key, asked in QUESTIONS.items()}
        ),
        "renoising": plain(renoised),
    }


def finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that have come to their end."""
    there = [run for run in runs if run.record.exists()]
    return [run for run in there if json.loads(run.record.read_text())["finished"]]


def answers(question: Question, folder: Path, scale: Scale) -> dict[str, Any]:
    """For every other arm that has run: its gap to the baseline, and what that says."""
    measure = measures.MEASURES[question.measure]
    asked, others = arms.held_out(question.baseline, scale)
    real = measures.measured(others, asked)
    found = {}
    for arm in question.others:
        pairs = [
            [Run(folder, each, seed, scale) for each in (question.baseline, arm)]
            for seed in scale.seeds
        ]
        pairs = [pair for pair in pairs if len(finished(pair)) == 2]
        gaps = [
            measures.paired_gap(
                measure, (kept(pair[0]), kept(pair[1])), real, scale.resamples
            )
            for pair in pairs
        ]
        if gaps:
            gap = measures.mean_gap(gaps)
            found[arm] = {
                "arm": arm,
                "measure": question.measure,
                "gap": gap,
                "of_seeds": [each.value for each in gaps],
                "verdict": measures.verdict(measure, gap),
            }
    return found


def kept(run: Run) -> dict[str, np.ndarray]:
    """What is kept of every clip of a run."""
    with np.load(run.arrays) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "clips"}
