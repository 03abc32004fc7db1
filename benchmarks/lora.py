# SPDX-License-Identifier: Apache-2.0
"""A style that adapters learn: the embedded model's shapes, on paper instead of black.

    python -m benchmarks.lora --to=benchmarks/results/lora.json

Clips of the embedded data set are drawn on a light ground, adapters of the embedded
model are trained on them for a few minutes, and both models are asked for the same
videos. Measured are the colour of the ground, and whether colour, shape and direction
are still those of the prompt. It ends with 1 if the ground is nearer to the old one.
"""

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import UInt8

from configs import lora
from launch import moving_shapes
from launch.moving_shapes import BACKGROUND, COLOURS, Settings, captions, judge, render
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.video_io import write_video
from pyramid_jax.finetune import finetune
from pyramid_jax.pipeline import video
from pyramid_jax.pipeline.folder import TINY

PAPER = (236, 228, 206)
SEED = 11  # of the clips; prompts are in another order
NEAR = 70  # of 255; a pixel so near to the paper belongs to it


def on_paper(
    clip: UInt8[np.ndarray, "f h w 3"], colour: str
) -> UInt8[np.ndarray, "f h w 3"]:
    """A drawn clip of one colour with the paper as its ground, edges included."""
    ground, paint = np.float32(BACKGROUND), np.float32(COLOURS[colour])
    contrast = paint - ground
    covered = ((clip - ground) @ contrast / (contrast @ contrast)).clip(0, 1)[..., None]
    return np.rint(PAPER + covered * (paint - np.float32(PAPER))).astype(np.uint8)


def off_paper(clip: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f h w 3"]:
    """A clip for the judge, who knows the old ground only."""
    far = np.linalg.norm(clip.astype(np.float32) - np.float32(PAPER), axis=-1)
    return np.where(far[..., None] < NEAR, np.uint8(BACKGROUND), clip)


def write_clips(folder: Path, count: int) -> Path:
    """Clips on paper, of all captions in turn; the path of their manifest."""
    order, records = captions(), []
    for i in np.random.default_rng(SEED).permutation(count):
        caption = order[i % len(order)]
        clip = render(caption, np.random.default_rng((SEED, i)))
        path = folder / f"{i:04}.mp4"
        settings = Settings()
        styled = on_paper(clip, caption.colour)
        write_video(path, styled, settings.fps, crf=settings.crf)
        records.append(Record(path, "video", caption.text))
    return write_manifest(folder / "manifest.jsonl", records)


def measured(clips: Iterable[np.ndarray], asked: Any) -> dict[str, Any]:
    """The mean colour of the border, and how much of the prompts is right."""
    border, right = [], []
    for clip, caption in zip(clips, asked, strict=True):
        edge = [clip[:, :2], clip[:, -2:], *(x.swapaxes(1, 2) for x in _sides(clip))]
        border.append(np.concatenate([x.reshape(-1, 3) for x in edge]).mean(0))
        seen = judge(off_paper(clip))
        right.append([a == b for a, b in zip(seen, caption, strict=True)])
    colour = np.mean(border, axis=0)
    distances = (np.linalg.norm(colour - x) for x in (PAPER, BACKGROUND))
    return {
        "border": [round(float(x), 1) for x in colour],
        **dict(zip(("to_paper", "to_black"), map(_rounded, distances), strict=True)),
        **dict(zip(("colour", "shape", "direction"), np.mean(right, 0), strict=True)),
    }


def _sides(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return clip[:, :, :2], clip[:, :, -2:]


def _rounded(x: Any) -> float:
    return round(float(x), 1)


def trained(folder: Path, clips: int, steps: int) -> Path:
    """Trains adapters on clips on paper; their file."""
    cfg = lora.get_config("tiny")
    cfg.data.manifest = str(write_clips(folder, clips))
    targets = ("qkv", "out", "mlp_in", "mlp_out", "modulation")
    cfg.lora.update(rank=8, alpha=8.0, targets=targets)
    cfg.optimizer.steps = cfg.loop.steps = steps
    cfg.loop.update(sample_every=0, save_every=steps)
    cfg.prompts = ()
    return finetune(cfg, folder / "run", TINY)


def main(_: object) -> None:
    options, began = flags.FLAGS, time.process_time()
    order = np.random.default_rng(SEED + 1).permutation(len(captions()))
    asked = [captions()[i] for i in order[: options.videos]]
    prompts, results = [caption.text for caption in asked], {}
    found: dict[str, Any] = {"videos": options.videos, "frames": options.frames}
    with tempfile.TemporaryDirectory() as name:
        file = Path(
            options.adapters or trained(Path(name), options.clips, options.steps)
        )
        found["steps"], found["clips"] = options.steps, options.clips
        found["cpu_seconds_before_sampling"] = round(time.process_time() - began)
        found["bytes"] = file.stat().st_size
        for strength in (0.0, 1.0):
            model = video.load(TINY, lora={file: strength} if strength else {})
            made = model(prompts, seed=0, num_frames=options.frames).frames
            results[f"strength {strength:g}"] = measured(made, asked)
    drawn = [moving_shapes.small(render(c, np.random.default_rng(5))) for c in asked]
    styled = [on_paper(x, c.colour) for x, c in zip(drawn, asked, strict=True)]
    results["drawn on paper"] = measured(styled, asked)
    text = json.dumps(found | {"results": results}, indent=1) + "\n"
    print(text)
    if options.to:
        Path(options.to).write_text(text, encoding="utf-8")
    if results["strength 1"]["to_paper"] > results["strength 1"]["to_black"]:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("to", None, "File to write the result to, as JSON.")
    flags.DEFINE_integer("clips", 144, "Clips to train on.", lower_bound=1)
    flags.DEFINE_string("adapters", None, "File of adapters from an earlier run.")
    flags.DEFINE_integer("frames", 8, "Frames of a video; 1: images.", lower_bound=1)
    flags.DEFINE_integer("steps", 120, "Steps of training.", lower_bound=1)
    flags.DEFINE_integer("videos", 8, "Videos to measure.", lower_bound=1)
    app.run(main)
