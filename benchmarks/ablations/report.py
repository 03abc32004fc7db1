# SPDX-License-Identifier: Apache-2.0
"""Tables of the ablations' results, as `benchmarks.tables` writes them into docs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.ablations import released
from benchmarks.ablations.plan import QUESTIONS, is_image
from benchmarks.device.report import table
from pyramid_jax.layout import HISTORIES

RESULTS = Path(__file__).resolve().parent.parent / "results" / "ablations.json"
NOT_RUN = "not run yet"
_HISTORY = {
    "pyramid": "temporal pyramid",
    "full": "full resolution",
    "none": "full sequence, bidirectional",
}


def answers_table(found: Mapping[str, Any]) -> str:
    """Every question, with what came out and what the paper says."""
    rows = []
    for name, question in QUESTIONS.items():
        for arm in question.others:
            answer = found.get("answers", {}).get(name, {}).get(arm)
            cells = [NOT_RUN, "", "", ""] if answer is None else _cells(found, answer)
            rows.append([question.figure, question.baseline, arm, *cells])
    head = ("paper", "baseline", "other arm", "measure, other - baseline (95 %)")
    return table((*head, "of each seed", "real clips", "the claim"), rows)


def runs_table(found: Mapping[str, Any]) -> str:
    """What every run was, and all its measures at its end."""
    rows = []
    for run in found.get("runs", {}).values():
        cost, last = run["cost"], run["points"][-1]
        seconds = sum(point["training_cpu_seconds"] for point in run["points"])
        measures = last["measures"]
        rows.append(
            [
                f"{run['arm']}, seed {run['seed']}",
                f"{cost['flop'] / 1e9:.2f}",
                f"{cost['video_tokens']:.0f}",
                f"{cost['segments']:.1f}",
                str(run["steps"]),
                f"{seconds:.0f}",
                *(_number(measures.get(name)) for name in _SHOWN),
                f"{run['commit']}, {run['date']}, {run['device']}",
            ]
        )
    for kind, measures in found.get("real", {}).items() if rows else ():
        shown = (_number(measures.get(name)) for name in _SHOWN)
        rows.append([f"real {kind}", *[""] * 5, *shown, ""])
    if not rows:
        return f"No arm has been trained: {NOT_RUN}."
    head = ("run", "GFLOP of a step", "video tokens", "segments", "steps", "CPU s")
    return table((*head, *_SHOWN.values(), "commit, date, device"), rows)


def renoising_table(found: Mapping[str, Any]) -> str:
    """Blockiness and spectra by renoising, of each model."""
    rows = []
    for name, report in found.get("renoising", {}).items():
        for kind, row in report["rows"].items():
            gap = row.get("more_blockiness")
            more = "" if gap is None else _interval(gap)
            distance = _number(row.get("spectrum_distance"))
            told = [_number(row["blockiness"]), more, distance]
            rows.append([f"{name}, {report['captions']} captions", kind, *told])
    if not rows:
        return f"Renoising: {NOT_RUN}."
    head = ("model", "noise at the jumps", "blockiness", "more than corrective (95 %)")
    return table((*head, "spectrum, dB from real"), rows)


def costs_table(_: Mapping[str, Any]) -> str:
    """Tokens and FLOP of histories at the released sizes."""
    rows = []
    for video in released.VIDEOS:
        base = released.history_cost(video, HISTORIES[0])
        for history in HISTORIES:
            cost = released.history_cost(video, history)
            rows.append(
                [
                    video,
                    _HISTORY[history],
                    f"{cost.tokens:,}",
                    f"{cost.step / 1e12:.1f}",
                    f"{cost.video / 1e15:.2f}",
                    f"{cost.video / base.video:.2f}",
                ]
            )
    head = ("video", "history", "tokens of the longest step", "TFLOP of that step")
    return table((*head, "PFLOP of a video", "times the pyramid's"), rows)


def read_results() -> dict[str, Any]:
    """What was published last; nothing if nothing was."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


# By the names of their places in documents.
TABLES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "ablation_answers": lambda: answers_table(read_results()),
        "ablation_runs": lambda: runs_table(read_results()),
        "ablation_renoising": lambda: renoising_table(read_results()),
        "ablation_costs": lambda: costs_table({}),
    }
)
_SHOWN = {
    "frechet": "Fréchet",
    "frechet_last": "Fréchet, last frames",
    "colours": "colours",
    "kinds": "kinds",
    "motions": "motions",
    "steady": "steady",
    "blockiness": "blockiness",
}


def _cells(found: Mapping[str, Any], answer: Mapping[str, Any]) -> list[str]:
    kind = "images" if is_image(answer["arm"]) else "videos"
    real = found["real"][kind][answer["measure"]]
    seeds = ", ".join(f"{value:.3f}" for value in answer["of_seeds"])
    gap = f"{_SHOWN[answer['measure']]}: {_interval(answer['gap'])}"
    return [gap, seeds, f"{real:.3f}", answer["verdict"]]


def _interval(gap: Mapping[str, float]) -> str:
    value, low, high = (gap[name] for name in ("value", "low", "high"))
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
