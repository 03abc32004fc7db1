# SPDX-License-Identifier: Apache-2.0
"""VBench's prompts, and its scores of 16 dimensions as total, quality and semantic.

Source: Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative
Models" (arXiv:2311.17982), and the tables of its repository.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyramid_jax

PROMPTS = Path(pyramid_jax.__file__).parent / "assets" / "vbench" / "prompts.json"
CLIPS, FLICKERING_CLIPS = 4720, 1875  # of the whole list

SUFFIX = "_eval_results.json"


class Dimension(NamedTuple):
    """The score that becomes 0, the one that becomes 1, and the weight in a mean."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
_QUALITY_WEIGHT = 0.8  # in the total


class Totals(NamedTuple):
    """VBench's summary of all dimensions, 0 to 1."""

    total: float
    quality: float
    semantic: float


def read_prompts(path: str | Path | None = None) -> dict[str, tuple[str, ...]]:
    """VBench's prompts, each with all dimensions that it is for.

    Args:
        path: of a list like VBench_full_info.json; None: that of the package.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    path = Path(path or PROMPTS)
    prompts: dict[str, tuple[str, ...]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            prompt, names = entry["prompt_en"], entry["dimension"]
            prompts[prompt] = (*prompts.get(prompt, ()), *names)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no list of prompts of VBench ({error!r}); give its "
            "VBench_full_info.json"
        ) from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt; give VBench_full_info.json")
    return prompts


def read_scores(path: str | Path) -> dict[str, float]:
    """The score of every dimension, 0 to 1, that VBench wrote into a folder or a file.

    Raises:
        ValueError: no results, broken ones, or two that contradict each other.
    """
    path = Path(path)
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"{path} holds no file that ends with {SUFFIX}; give the folder that "
            "VBench wrote to"
        )
    scores: dict[str, float] = {}
    for file in files:
        for name, score in _scores_of(file).items():
            if scores.setdefault(name, score) != score:
                raise ValueError(
                    f"{file} says that {name} is {score}, another file of {path} that "
                    f"it is {scores[name]}; leave the files of one run"
                )
    return scores


def totals(scores: dict[str, float]) -> Totals:
    """What VBench makes of the scores of all dimensions.

    Each is stretched from its low and high to 0 and 1; quality and semantic are
    weighted means; the total is their mean with weights 4 and 1.

    Raises:
        ValueError: a dimension is missing, unknown or not between 0 and 1.
    """
    known = QUALITY | SEMANTIC
    missing, unknown = known.keys() - scores.keys(), scores.keys() - known.keys()
    if missing or unknown:
        raise ValueError(
            f"dimensions missing: {', '.join(sorted(missing)) or 'none'}; unknown: "
            f"{', '.join(sorted(unknown)) or 'none'}; VBench would count missing ones "
            "as 0: run them, too"
        )
    if wrong := {name: x for name, x in scores.items() if not 0 <= x <= 1}:
        raise ValueError(f"scores {wrong}: expected 0 to 1, as VBench writes them")
    quality, semantic = _mean(scores, QUALITY), _mean(scores, SEMANTIC)
    total = _QUALITY_WEIGHT * quality + (1 - _QUALITY_WEIGHT) * semantic
    return Totals(total, quality, semantic)


def score_table(scores: dict[str, float], summary: Totals) -> str:
    """Scores and their summary as Markdown, in percent as VBench's leaderboard."""
    lines = ["| dimension | percent |", "|---|---|"]
    for name in (*QUALITY, *SEMANTIC):
        lines.append(f"| {name.replace('_', ' ')} | {100 * scores[name]:.2f} |")
    for name, value in summary._asdict().items():
        lines.append(f"| **{name}** | **{100 * value:.2f}** |")
    return "\n".join(lines)


def _mean(scores: dict[str, float], dimensions: dict[str, Dimension]) -> float:
    weights = sum(each.weight for each in dimensions.values())
    stretched = (
        each.weight * (scores[name] - each.low) / (each.high - each.low)
        for name, each in dimensions.items()
    )
    return sum(stretched) / weights


def _scores_of(file: Path) -> dict[str, float]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return {name: float(result[0]) for name, result in content.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{file} is no file of results of VBench ({error!r}); replace it or leave "
            "it out"
        ) from error
