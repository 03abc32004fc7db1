# SPDX-License-Identifier: Apache-2.0
"""Trains, samples and measures one arm; what is done already is not done again."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ablations import costs, measures, plan, scenes
from benchmarks.ablations.plan import Scale
from benchmarks.timing import environment
from configs import ablations
from launch.evaluate.judges import Asked
from launch.evaluate.metrics import Clip
from launch.evaluate.reports import write_report
from pyramid_jax.pipeline import video
from pyramid_jax.pipeline.video import VideoPipeline
from pyramid_jax.train import train

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
HELD_OUT = 11, 12  # seeds of the captions, and of the real clips beside them
BATCH = 50  # videos sampled together
_SEEDS = 10_000  # of samples, for every seed of training


class Run(NamedTuple):
    """One arm with one seed, and where it is."""

    folder: Path
    arm: str
    seed: int
    scale: Scale

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"

    @property
    def record(self) -> Path:
        """The numbers, as JSON."""
        return self.folder / f"{self.name}.json"

    @property
    def arrays(self) -> Path:
        """What is kept of every clip at the end."""
        return self.folder / f"{self.name}.npz"

    @property
    def model(self) -> Path:
        return self.folder / self.name / "model"

    @property
    def start(self) -> Path | None:
        """The model whose weights it begins with; images begin from nothing."""
        return None if plan.is_image(self.arm) else self._replace(arm=plan.START).model

    @property
    def points(self) -> int:
        """How often it is measured."""
        return self.scale.points if plan.is_image(self.arm) else 1


def held_out(arm: str, scale: Scale) -> tuple[list[Asked], list[Clip]]:
    """The captions of an arm's kind, and other real clips."""
    kind = "image" if plan.is_image(arm) else "video"
    count = scale.images if plan.is_image(arm) else scale.videos
    mine, others = (scenes.asked(count, seed, kind) for seed in HELD_OUT)
    return mine, [each.real for each in others]


def run_arm(run: Run) -> dict[str, Any]:
    """The record of an arm, which is completed if it is not there."""
    done = json.loads(run.record.read_text()) if run.record.exists() else {}
    if done.get("finished"):
        return done
    scale, cfg = run.scale, arm_config(run)
    flop = 1e15 * (scale.image_pflop if plan.is_image(run.arm) else scale.video_pflop)
    cost = costs.mean_cost(cfg, run.folder)
    steps = costs.steps_of(flop, cost, run.points)
    with cfg.unlocked():
        cfg.optimizer.steps = steps
        cfg.optimizer.warmup_steps = min(cfg.optimizer.warmup_steps, steps)
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "steps": steps,
        "cost": cost._asdict(),
        "flop": steps * cost.flop,
        "points": done.get("points", []),
        **environment(PACKAGES),
    }
    asked, others = held_out(run.arm, scale)
    real = measures.measured(others, asked)
    for point in range(len(record["points"]) + 1, run.points + 1):
        cfg.loop.steps = steps * point // run.points
        cfg.loop.save_every = cfg.loop.steps
        begun = time.time(), time.process_time()
        train(cfg, run.folder / run.name, run.start)
        took = time.time() - begun[0], time.process_time() - begun[1]
        clips = sampled(video.load(run.model), asked, _SEEDS * run.seed)
        kept = measures.measured(clips, asked)
        np.savez(run.arrays, clips=np.stack(clips[:8]), **kept)
        record["points"].append(
            {
                "step": cfg.loop.steps,
                "flop": cfg.loop.steps * cost.flop,
                "training_seconds": took[0],
                "training_cpu_seconds": took[1],
                "measures": values(kept, real),
            }
        )
        write_report(run.record, record | {"finished": point == run.points})
    return record


def arm_config(run: Run) -> Any:
    """The config of an arm, with its data and seed."""
    cfg = ablations.get_config(run.arm)
    kind = "images" if plan.is_image(run.arm) else "videos"
    cfg.data.manifest = str(run.folder / "data" / f"{kind}.jsonl")
    cfg.seed = cfg.data.seed = run.seed
    return cfg


def sampled(model: VideoPipeline, asked: Sequence[Asked], seed: int) -> list[Clip]:
    """A clip for every caption; the last batch is filled up, so that all are alike."""
    batch, clips = min(BATCH, len(asked)), []
    frames = len(asked[0].real)
    size = {"height": scenes.SIDE, "width": scenes.SIDE, "num_frames": frames}
    for first in range(0, len(asked), batch):
        texts = [each.text for each in asked[first : first + batch]]
        filled = (texts * batch)[:batch]
        made = model(filled, seed=seed + first, **size).frames
        clips += list(made[: len(texts)])
    return clips


def values(kept: measures.Arrays, real: measures.Arrays) -> dict[str, float]:
    """Every measure that there is for what is kept."""
    found = {}
    for name, measure in measures.MEASURES.items():
        try:
            found[name] = measure.value(kept, real)
        except KeyError:  # images don't move
            continue
    return found


def real_values(arm: str, scale: Scale) -> dict[str, float]:
    """The measures of real clips: what a perfect model would have."""
    asked, others = held_out(arm, scale)
    kept = measures.measured([each.real for each in asked], asked)
    return values(kept, measures.measured(others, asked))
