# SPDX-License-Identifier: Apache-2.0
"""What clips of an arm are measured by, and how sure a difference is."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from benchmarks.ablations import scenes
from launch.evaluate import metrics
from launch.evaluate.distances import frechet
from launch.evaluate.judges import Asked
from launch.evaluate.metrics import Clip
from launch.pairs.judge import clip_features, judge_pair, look

BLOCK = 2  # side of what a jump copies
PERCENTILES = 2.5, 97.5
Arrays = Mapping[str, np.ndarray]  # by name, a row for each clip


class Measure(NamedTuple):
    """A number for a set of clips, from what is kept of each.

    Attributes:
        value: of these arrays and those of other real clips.
        less: whether less is better.
    """

    title: str
    value: Callable[[Arrays, Arrays], float]
    less: bool


def _distance(name: str) -> Callable[[Arrays, Arrays], float]:
    def value(made: Arrays, real: Arrays) -> float:
        # Clips that vary in nothing else have constant columns.
        varies = real[name].std(axis=0) > 0
        return frechet(made[name][:, varies], real[name][:, varies])

    return value


def _share(name: str) -> Callable[[Arrays, Arrays], float]:
    return lambda made, real: float(made[name].mean())


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "frechet": Measure("Fréchet distance", _distance("features"), True),
        "frechet_last": Measure(
            "Fréchet distance of last frames", _distance("last"), True
        ),
        "steady": Measure(
            "frames in which objects stay what they were", _share("steady"), False
        ),
        "colours": Measure("colours right", _share("colours"), False),
        "kinds": Measure("kinds right", _share("kinds"), False),
        "motions": Measure("motions right", _share("motions"), False),
        "blockiness": Measure("blockiness", _share("blockiness"), True),
    }
)


def measured(clips: Sequence[Clip], asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """What is kept of every clip."""
    large = scenes.enlarged(clips)
    rights = [
        judge_pair(clip).right(each.expected)
        for clip, each in zip(large, asked, strict=True)
    ]
    kept = {name: np.array([right[name] for right in rights]) for name in rights[0]}
    if len(clips[0]) == 1:
        del kept["motions"]
    else:
        kept["steady"] = np.array([steadiness(clip) for clip in large])
        kept["last"] = clip_features([clip[-1:] for clip in large])
    kept["features"] = clip_features(large)
    kept["blockiness"] = np.array([blockiness(clip) for clip in clips])
    kept["spectrum"] = np.stack([metrics.spectrum(clip) for clip in clips])
    return kept


def steadiness(clip: Clip) -> float:
    """The share of frames that show the same objects as the frame before."""
    sight = look(clip)
    present, kinds = sight.present > 0, sight.kind.argmax(axis=-1)
    seen = np.where(present, kinds, -1)
    return float((seen[1:] == seen[:-1]).all(axis=1).mean())


def blockiness(clip: Clip) -> float:
    """The mean step between 2x2 blocks over that inside them; 1 without blocks."""
    luma = clip.astype(np.float32).mean(axis=-1)
    across = [abs(np.diff(luma, axis=axis)) for axis in (1, 2)]
    inside = across[0][:, ::BLOCK].mean() + across[1][:, :, ::BLOCK].mean()
    between = across[0][:, 1::BLOCK].mean() + across[1][:, :, 1::BLOCK].mean()
    return float((between + 1e-3) / (inside + 1e-3))


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Gap(NamedTuple):
    """How much more an arm has of a measure than another, and the same of resamples."""

    value: float
    drawn: Float[np.ndarray, "resamples"]


def paired_gap(
    measure: Measure, arms: tuple[Arrays, Arrays], real: Arrays, resamples: int
) -> Gap:
    """What the second arm has more than the first, by a bootstrap over captions.

    Row i of both arms is of one caption and seed: captions are drawn for both at once.
    """

    def gap(chosen: np.ndarray) -> float:
        values = [
            measure.value({name: rows[chosen] for name, rows in arm.items()}, real)
            for arm in arms
        ]
        return values[1] - values[0]

    count = len(next(iter(arms[0].values())))
    rng = np.random.default_rng(0)
    drawn = [gap(rng.integers(count, size=count)) for _ in range(resamples)]
    return Gap(gap(np.arange(count)), np.array(drawn))


def mean_gap(gaps: Sequence[Gap]) -> Interval:
    """The mean gap of several seeds of training."""
    value = float(np.mean([gap.value for gap in gaps]))
    return interval(value, np.mean([gap.drawn for gap in gaps], axis=0))


def interval(value: float, drawn: Float[np.ndarray, "resamples"]) -> Interval:
    """A value with the 95 % interval of its bootstrap.

    Resamples hold fewer different clips, which moves some measures; their spread is
    put around the value.
    """
    low, high = np.percentile(drawn, PERCENTILES) - drawn.mean()
    return Interval(value, value + float(low), value + float(high))


def verdict(measure: Measure, gap: Interval) -> str:
    """What a gap of another arm to the baseline says of the claim."""
    better = gap.low > 0 if measure.less else gap.high < 0
    worse = gap.high < 0 if measure.less else gap.low > 0
    return "agrees" if better else "disagrees" if worse else "undecided"
