# SPDX-License-Identifier: Apache-2.0
"""Time to 80 % on bouncing pairs: how long a method trains until its videos are right.

python -m benchmarks.leaderboard --entry pyramid --to runs/leaderboard/pyramid
python -m benchmarks.leaderboard --entry plain --to runs/leaderboard/plain --publish

An entry trains from nothing, on two cores or on one accelerator, and stops now and then
to sample held-out captions: 9 frames of 32x32 pixels. It has arrived when colours,
kinds and motions are all right in 80 % of them. The seconds are those of training,
compiling and reading included, drawing and measuring not. An interrupted command is
continued by the same one. docs/leaderboard.md has the rules.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.ablations import scenes
from benchmarks.ablations.arms import PACKAGES, sampled
from benchmarks.device.report import table
from benchmarks.timing import environment
from configs import ablations
from launch.evaluate.judges import Asked
from launch.evaluate.metrics import Clip
from launch.evaluate.reports import write_report
from launch.moving_shapes import wilson
from launch.pairs.judge import judge_pair
from launch.start import enable_compile_cache
from pyramid_jax.pipeline import video
from pyramid_jax.train import train

RESULTS = Path(__file__).resolve().parent / "results" / "leaderboard.json"
GOAL = 0.8
CAPTIONS, SEED = 100, 21  # which are held out
SCENES = 8000  # of training
RESPECTS = ("colours", "kinds", "motions")
RATE = scenes.FAST
NONE = "No entry has been run to its end yet."
MINUTE = 60
_ENDLESS = 10**7  # steps


def entry_config(arm: str) -> Any:
    """An arm of the ablations, with longer videos and a constant rate of learning."""
    cfg = ablations.get_config(arm)
    cfg.data.update(frames=RATE.frames, fps=float(RATE.fps), tokens=9 * 64, segments=9)
    cfg.data.text_tokens = 9 * ablations.WORDS["video"]
    cfg.optimizer.update(schedule="constant", steps=_ENDLESS, learning_rate=1e-3)
    cfg.step.ema_decay = 0.998
    cfg.loop.update(steps=_ENDLESS, save_every=_ENDLESS)
    return cfg


# What is run, by the name of the entry; whoever beats one adds another.
ENTRIES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "pyramid": lambda: entry_config("pyramid"),
        "plain": lambda: entry_config("plain"),
    }
)
TITLES = {"pyramid": "pyramidal flow", "plain": "plain flow matching, whole videos"}


def race(entry: str, folder: Path, every: float, limit: float) -> dict[str, Any]:
    """Trains until the goal or the limit; the record, which is in the folder, too.

    Args:
        every, limit: seconds of training between measurements, and in all.
    """
    place, cfg = folder / "record.json", ENTRIES[entry]()
    asked = scenes.asked(CAPTIONS, SEED, "video", RATE)
    record = {"entry": entry, "goal": GOAL, "points": [], **environment(PACKAGES)}
    if place.exists():
        record = json.loads(place.read_text())
    scenes.write_scenes(folder / "data", SCENES, RATE)
    cfg.data.manifest = str(folder / "data" / "videos.jsonl")
    while not ended(record, limit):
        seconds = spent(record)
        with cfg.unlocked():
            cfg.loop.max_seconds = float(min(every, limit - seconds))
        begun = time.monotonic()
        train(cfg, folder / "run")
        seconds += time.monotonic() - begun
        clips = sampled(video.load(folder / "run" / "model"), asked, seed=0)
        record["points"].append({"seconds": seconds, **counts(clips, asked)})
        write_report(place, record | {"finished": ended(record, limit)})
    return record | {"finished": True}


def counts(clips: Sequence[Clip], asked: Sequence[Asked]) -> dict[str, int]:
    """How many clips are right in each respect, and in all."""
    pairs = zip(scenes.enlarged(clips), asked, strict=True)
    rights = [judge_pair(clip).right(each.expected) for clip, each in pairs]
    found = {name: int(np.sum([right[name] for right in rights])) for name in rights[0]}
    return found | {"all": sum(all(right.values()) for right in rights)}


def spent(record: Mapping[str, Any]) -> float:
    """Seconds of training so far."""
    return record["points"][-1]["seconds"] if record["points"] else 0.0


def arrived(record: Mapping[str, Any]) -> float | None:
    """Seconds until the goal, None if it was not reached."""
    goal = record["goal"] * CAPTIONS
    return next((p["seconds"] for p in record["points"] if p["all"] >= goal), None)


def ended(record: Mapping[str, Any], limit: float) -> bool:
    """Whether there is nothing left to do."""
    return arrived(record) is not None or spent(record) >= limit


def leaderboard() -> str:
    """The table of finished entries, the fastest first."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = []
    for record in sorted(records, key=lambda one: arrived(one) or float("inf")):
        points = record["points"]
        best = max(point["all"] for point in points)
        low, high = wilson(best, CAPTIONS)
        time_to_goal = arrived(record)
        told = f"not in {spent(record) / MINUTE:.0f}"
        rows.append(
            [
                TITLES.get(record["entry"], record["entry"]),
                told if time_to_goal is None else f"{time_to_goal / MINUTE:.0f}",
                f"{best} % ({low:.0%} to {high:.0%})",
                *(f"{points[-1][name]} %" for name in RESPECTS),
                f"{record['device']}, {record['cpu']}, {record['threads']} threads",
                f"{record['commit']}, {record['date']}",
            ]
        )
    head = ["entry", f"minutes to {GOAL:.0%}", "best, all right", *RESPECTS]
    head += ["machine", "commit, date"]
    return table(head, rows) or NONE


def publish(record: Mapping[str, Any]) -> None:
    """Adds an entry to those of the documents."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*records, record], indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs an entry."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entry", required=True, choices=ENTRIES)
    parser.add_argument("--to", required=True, help="folder of the run")
    parser.add_argument("--every", type=float, default=15, help="minutes of training")
    parser.add_argument("--limit", type=float, default=240, help="minutes in all")
    parser.add_argument("--publish", action="store_true", help="add it to the table")
    options = parser.parse_args(argv)
    enable_compile_cache()
    seconds = MINUTE * options.every, MINUTE * options.limit
    record = race(options.entry, Path(options.to), *seconds)
    print(json.dumps(record["points"][-1]))
    if options.publish:
        publish(record)


if __name__ == "__main__":
    main()
