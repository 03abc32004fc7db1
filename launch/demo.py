# SPDX-License-Identifier: Apache-2.0
"""Makes videos with the model that ships with the project.

    pyramid-jax demo

writes an mp4 file per prompt (text to video, and image to video from drawn first
frames), what each was made from, as launch.sample does, and a contact sheet.
"""

import re
import time
from pathlib import Path

import numpy as np
from absl import flags

from launch import start
from launch.pairs.dataset import pair
from launch.pairs.scene import Settings
from launch.sample import outputs
from launch.sample.outputs import Job, Render
from launch.sample.progress import run
from pyramid_jax.data import video_io
from pyramid_jax.data.pictures import write_contact_sheet, write_picture
from pyramid_jax.pipeline.folder import PAIRS
from pyramid_jax.pipeline.request import check_seed
from pyramid_jax.pipeline.video import VideoPipeline, load

PROMPTS = (
    "a red circle moves sideways while a blue seven goes up and down",
    "a yellow star and a magenta digit three both bounce diagonally",
    "a green handwritten 5 moves vertically, a cyan ring goes left and right",
    "a cyan square that bounces off all four walls and a red two that moves sideways",
    "a blue triangle moves up and down, a yellow handwritten zero bounces diagonally",
    "a magenta one and a green circle both move horizontally",
)
FIRST_FRAMES = 5, 10  # numbers of held-out scenes
FRAMES, SCALE = 17, 4
_WORDS = 8  # of a caption, in the name of a file


def main(values: flags.FlagValues) -> None:
    start.check_writable(values.to)
    check_seed(values.seed, len(PROMPTS))
    began, folder = time.monotonic(), Path(values.to)
    print(f"making {len(PROMPTS) + len(FIRST_FRAMES)} videos with {values.model}")
    sheet = make(load(values.model), folder, values.seed)
    print(f"mp4 files: {folder}\ncontact sheet: {sheet}")
    print(f"took {time.monotonic() - began:.0f} s")


def make(model: VideoPipeline, folder: Path, seed: int) -> Path:
    """Writes the videos into a folder; returns the path of their contact sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = text_to_video(model, folder, seed)
    continued = image_to_video(model, folder, seed)
    jobs = [*drawn, *continued]
    run(model, jobs, batch=len(drawn))
    captions = [*PROMPTS]
    captions += [f"{job.request.prompts[0]} (first frame given)" for job in continued]
    videos = [shown(outputs.read(job.path)) for job in jobs]
    return write_contact_sheet(folder / "contact_sheet.png", videos, captions)


def text_to_video(model: VideoPipeline, folder: Path, seed: int) -> list[Job]:
    """A file for every prompt; one batch can hold them."""
    frames = model.cfg.latent.longest(FRAMES)
    return [
        Job(
            model.request(prompt, num_frames=frames, seed=seed + i),
            folder / f"{i}_{_name(prompt)}.mp4",
            scale=SCALE,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def image_to_video(model: VideoPipeline, folder: Path, seed: int) -> list[Job]:
    """A file for every scene whose first frame is drawn, not generated."""
    frames, jobs = model.cfg.latent.longest(FRAMES), []
    for i, number in enumerate(FIRST_FRAMES):
        scene = pair(number, split="held out", settings=Settings(1), kind="video")
        image = folder / f"first_frame_{i}.png"
        write_picture(image, scene.pixels[0])
        request = model.request(
            scene.text, image=image, num_frames=frames, seed=seed + i
        )
        path = folder / f"{len(PROMPTS) + i}_{_name(scene.text)}_from_image.mp4"
        jobs.append(Job(request, path, image, SCALE))
    return jobs


def shown(render: Render) -> np.ndarray:
    """The frames in a file."""
    recipe = render.recipe
    size = recipe.height * recipe.scale, recipe.width * recipe.scale
    return video_io.read_video(render.path, size, recipe.frames, recipe.fps)


def _name(caption: str) -> str:
    """What files are named after, e.g. "a_red_circle_moves"."""
    return "_".join(re.findall(r"\w+", caption)[:_WORDS])


if __name__ == "__main__":
    flags.DEFINE_string("model", str(PAIRS), "Folder of the model.")
    flags.DEFINE_string("to", "runs/demo", "Folder to write to.")
    flags.DEFINE_integer("seed", 0, "Seed of the first video; the others count up.")
    start.run(main)
