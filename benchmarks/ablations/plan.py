# SPDX-License-Identifier: Apache-2.0
"""What is asked, of which arms, and by which measure: fixed before anything is run."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from configs.ablations import ARMS

PFLOP = 10**15
IMAGES = "images_"  # arms of images begin like this; the others are videos
START = "images_3_stages"  # whose weights arms of videos begin with, as in the paper


class Scale(NamedTuple):
    """How much is drawn, trained and sampled.

    Attributes:
        image_pflop, video_pflop: arithmetic of a training run, forward and backward.
        seeds: every arm is trained with each of them.
        scenes: drawn for training.
        images, videos: held-out captions that are sampled.
        points: an arm of images is measured so often on its way.
        resamples: of the bootstrap.
    """

    image_pflop: float
    video_pflop: float
    seeds: tuple[int, ...]
    scenes: int
    images: int
    videos: int
    points: int = 4
    resamples: int = 200


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "smoke": Scale(4e-5, 4e-5, (0,), 24, 4, 4, points=2, resamples=20),
        "brief": Scale(0.0035, 0.005, (0,), 1000, 100, 50, points=2),
        "default": Scale(0.007, 0.0105, (0,), 4000, 200, 100),
        "full": Scale(0.014, 0.02, (0, 1, 2), 8000, 200, 100),
    }
)


class Question(NamedTuple):
    """What the paper says of some arms, beside a baseline, and how it is decided.

    Attributes:
        measure: see `measures.MEASURES`; less is better where that says so.
        claim: of the paper; the baseline is better than each other arm.
    """

    title: str
    figure: str
    baseline: str
    others: tuple[str, ...]
    measure: str
    claim: str


QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {
        "spatial": Question(
            "Spatial pyramid or one stage",
            "Fig. 7",
            "images_3_stages",
            ("images_1_stage",),
            "frechet",
            "for the same training, three stages have a smaller distance than one",
        ),
        "stages": Question(
            "Number of stages",
            "section 4.1, which chooses three",
            "images_3_stages",
            ("images_1_stage", "images_2_stages", "images_4_stages"),
            "frechet",
            "none is published; three stages are the choice of all experiments",
        ),
        "temporal": Question(
            "Temporal pyramid or full sequences",
            "Fig. 8",
            "pyramid",
            ("sequences",),
            "frechet",
            "for the same training, the pyramid looks better and moves better",
        ),
        "history": Question(
            "History in a pyramid or at full resolution",
            "section 3.3",
            "pyramid",
            ("full_history",),
            "frechet",
            "full resolution is redundant: the pyramid loses little, and trains faster",
        ),
        "causal": Question(
            "Causal or bidirectional attention",
            "Fig. 11",
            "pyramid",
            ("bidirectional",),
            "steady",
            "with bidirectional attention objects keep changing shape and colour",
        ),
        "corruption": Question(
            "Noise on the history in training",
            "section 4.1",
            "pyramid",
            ("corruption_0", "corruption_1_6", "corruption_2_3"),
            "frechet_last",
            "noise of up to 1/3 lessens the decay of later frames",
        ),
    }
)


def arms() -> tuple[str, ...]:
    """Every arm that a question needs, in the order of the config."""
    asked = {arm for q in QUESTIONS.values() for arm in (q.baseline, *q.others)}
    return tuple(arm for arm in ARMS if arm in asked)


def is_image(arm: str) -> bool:
    """Whether an arm makes images."""
    return arm.startswith(IMAGES)
