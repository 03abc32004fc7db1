# SPDX-License-Identifier: Apache-2.0
"""Fig. 10: images of one model with corrective, white and no noise at the jumps.

No arm is trained: the prompts and seeds are the same, and a model is sampled three
times. The embedded model of pixels draws plain backgrounds; the arm `images_3_stages`
has learnt textures.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablations import measures, scenes
from benchmarks.ablations.measures import Interval
from benchmarks.timing import environment
from launch.evaluate.distances import spectrum_distance
from launch.evaluate.judges import ask_shapes
from launch.evaluate.metrics import Clip, spectrum
from pyramid_jax.pipeline import video
from pyramid_jax.pipeline.folder import TINY
from pyramid_jax.pyramid import CORRECTIVE, RENOISING

EMBEDDED = {"embedded": TINY}
BATCH = 50
SEED = 500  # of the first image
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def compare(model: Path, texts: Sequence[str], real: Sequence[Clip], resamples: int):
    """Blockiness and spectra of images by renoising, as JSON, and the first images.

    Differences to corrective noise have intervals over captions, in pairs.
    """
    made = {kind: images(model, texts, kind) for kind in RENOISING}
    blocks = {
        kind: np.array([measures.blockiness(clip) for clip in clips])
        for kind, clips in {**made, "real": real}.items()
    }
    powers = {
        kind: np.stack([spectrum(clip) for clip in clips])
        for kind, clips in {**made, "real": real}.items()
    }
    rows: dict[str, Any] = {"real": {"blockiness": float(blocks["real"].mean())}}
    for kind in RENOISING:
        rows[kind] = {
            "blockiness": float(blocks[kind].mean()),
            "more_blockiness": _gap(blocks[kind] - blocks[CORRECTIVE], resamples),
            "spectrum_distance": spectrum_distance(powers[kind], powers["real"]),
            "spectrum": powers[kind].mean(axis=0).tolist(),
        }
    rows["real"]["spectrum"] = powers["real"].mean(axis=0).tolist()
    report = {
        "captions": len(texts),
        "seed": SEED,
        "rows": rows,
        **environment(_PACKAGES),
    }
    return report, {kind: np.stack(clips[:8])[:, 0] for kind, clips in made.items()}


def images(model: Path, texts: Sequence[str], renoising: str) -> list[Clip]:
    """An image for every text."""
    pipeline = video.load(model)
    options = replace(pipeline.defaults, renoising=renoising)
    clips: list[Clip] = []
    for first in range(0, len(texts), BATCH):
        part = list(texts[first : first + BATCH])
        made = pipeline(part, seed=SEED + first, num_frames=1, options=options)
        clips += list(made.frames)
    return clips


def embedded(captions: int) -> tuple[list[str], list[Clip]]:
    """Captions of the embedded model, and real images."""
    shown = ask_shapes(captions, SEED, 1, False)
    return [each.text for each in shown], [each.real[:1] for each in shown]


def textured(captions: int) -> tuple[list[str], list[Clip]]:
    """Held-out captions of bouncing pairs, and real images."""
    shown = scenes.asked(captions, SEED, "image")
    return [each.text for each in shown], [each.real for each in shown]


def _gap(differences: np.ndarray, resamples: int) -> Interval:
    rng = np.random.default_rng(0)
    count = len(differences)
    drawn = [
        differences[rng.integers(count, size=count)].mean() for _ in range(resamples)
    ]
    return measures.interval(float(differences.mean()), np.array(drawn))
