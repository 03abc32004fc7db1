# SPDX-License-Identifier: Apache-2.0
"""Makes videos with the model that ships with the project.

    pyramid-jax demo

writes an mp4 file per prompt (text to video, and image to video from drawn first
frames) and a contact sheet of all of them.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags, logging

from launch import moving_shapes, start
from pyramid_jax.data.pictures import write_contact_sheet
from pyramid_jax.data.video_io import write_video
from pyramid_jax.pipeline.folder import TINY_LATENT
from pyramid_jax.pipeline.video import VideoPipeline, load

PROMPTS = (
    "a red circle moves left",
    "a green square moves up",
    "a blue triangle moves down",
    "a yellow cross moves right",
    "a cyan ring moves left",
    "a magenta star moves up",
)
FIRST_FRAMES = ("a yellow star moves left", "a green ring moves down")
FRAMES, FPS, SCALE = 8, 8, 8


def main(values: flags.FlagValues) -> None:
    began = time.monotonic()
    folder = Path(values.to)
    sheet = make(load(values.model), folder, values.seed)
    logging.info("took %.0f s", time.monotonic() - began)
    print(f"mp4 files: {folder}\ncontact sheet: {sheet}")


def make(model: VideoPipeline, folder: Path, seed: int) -> Path:
    """Writes the videos into a folder; returns the path of their contact sheet."""
    captioned = [*text_to_video(model, seed), *image_to_video(model, seed)]
    for i, (caption, video) in enumerate(captioned):
        write_video(folder / f"{i}_{_name(caption)}.mp4", video, FPS, scale=SCALE)
    captions, videos = zip(*captioned, strict=True)
    return write_contact_sheet(folder / "contact_sheet.png", videos, captions)


def text_to_video(model: VideoPipeline, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(caption, video) of every prompt, sampled as one batch."""
    videos = model(PROMPTS, num_frames=model.cfg.latent.longest(FRAMES), seed=seed)
    return zip(PROMPTS, videos.frames, strict=True)


def image_to_video(model: VideoPipeline, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(caption, video) of prompts whose first frame is drawn, not generated."""
    frames = model.cfg.latent.longest(FRAMES)
    for i, prompt in enumerate(FIRST_FRAMES):
        rng = np.random.default_rng((seed, i))
        image = moving_shapes.small(
            moving_shapes.render(moving_shapes.parse(prompt), rng)
        )[0]
        videos = model(prompt, image=image, num_frames=frames, seed=seed + i)
        yield f"{prompt} (first frame given)", videos.frames[0]


def _name(caption: str) -> str:
    return "_".join(caption.replace("(", "").replace(")", "").split())


if __name__ == "__main__":
    flags.DEFINE_string("model", str(TINY_LATENT), "Folder of the model.")
    flags.DEFINE_string("to", "runs/demo", "Folder to write to.")
    flags.DEFINE_integer("seed", 0, "Seed of the first video; the others count up.")
    start.run(main)
