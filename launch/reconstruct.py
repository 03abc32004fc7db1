# SPDX-License-Identifier: Apache-2.0
"""Shows what a VAE keeps of a video or an image.

    python -m launch.reconstruct --model=runs/vae/model --input=clip.mp4 --to=out.mp4
    python -m launch.reconstruct --model=MODEL --input=photo.jpg --to=out.png --tile=256

writes original, reconstruction and four times their difference side by side, prints
PSNR and SSIM of every frame, and writes them as JSON beside the output.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from jaxtyping import UInt8
from matplotlib.image import imsave

from launch import start
from pyramid_jax.data import video_io
from pyramid_jax.data.video_io import to_model, to_uint8
from pyramid_jax.latents import LatentConfig
from pyramid_jax.vae import autoencoder, quality
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Pieces

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STRENGTH = 4  # of the difference


class Reconstruction(NamedTuple):
    """A video before and after the VAE, and decibels and SSIM of every frame."""

    original: UInt8[np.ndarray, "f h w 3"]
    made: UInt8[np.ndarray, "f h w 3"]
    psnr: list[float]
    ssim: list[float]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; see --help")
    start.enable()
    given = flags.FLAGS
    vae = autoencoder.load_autoencoder(given.model)
    frames = given.frames or None
    original, fps = read(Path(given.input), vae.latent, frames)
    pieces = Pieces(given.window * vae.latent.temporal, given.tile, given.overlap)
    found = reconstruct(vae, original, pieces)
    out = Path(given.to)
    write(out, found, fps)
    print(table(found))
    scores = {"input": given.input, "psnr": found.psnr, "ssim": found.ssim}
    out.with_suffix(".json").write_text(json.dumps(scores, indent=1) + "\n")
    logging.info("%s", out)


def read(
    path: Path, latent: LatentConfig, frames: int | None = None
) -> tuple[UInt8[np.ndarray, "f h w 3"], float]:
    """A file's frames as far as they fit the latents, in its own size; its fps.

    Args:
        frames: at most so many; None: all.

    Raises:
        ValueError: a missing or broken file, or one too small for a latent cell.
    """
    about = video_io.about(path)
    multiple = math.lcm(latent.spatial, 2)  # H.264 wants even sizes
    size = (about.height // multiple * multiple, about.width // multiple * multiple)
    if not min(size):
        raise ValueError(
            f"{path} shows {about.height}x{about.width} pixels, expected at least "
            f"{multiple}x{multiple}; give a larger picture"
        )
    if path.suffix.lower() in IMAGES:
        return video_io.read_image(path, size)[None], 1.0
    count = min(frames or about.frames, about.frames)
    count = 1 + (count - 1) // latent.temporal * latent.temporal
    return video_io.read_video(path, size, count, about.fps), about.fps


def reconstruct(
    vae: Autoencoder, original: UInt8[np.ndarray, "f h w 3"], pieces: Pieces
) -> Reconstruction:
    """What the VAE makes of a video, without noise."""
    codec, pixels = autoencoder.vae_codec(vae), to_model(original[None])
    decoded = np.asarray(codec.decode(codec.encode(pixels, None, pieces), pieces))
    made = to_uint8(decoded)[0]
    scores = (f(pixels[0], to_model(made)) for f in (quality.psnr, quality.ssim))
    psnr, ssim = (np.asarray(values).tolist() for values in scores)
    return Reconstruction(original, made, psnr, ssim)


def write(path: Path, found: Reconstruction, fps: float) -> None:
    """Writes original, reconstruction and difference as a video, or as an image."""
    original, made = (x.astype(int) for x in (found.original, found.made))
    difference = np.clip(STRENGTH * np.abs(made - original), 0, 255)
    shown = np.concatenate([original, made, difference], axis=2).astype(np.uint8)
    if path.suffix.lower() in IMAGES:
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, shown[0])
    else:
        video_io.write_video(path, shown, fps)


def table(found: Reconstruction) -> str:
    """PSNR and SSIM of every frame, and their means."""
    lines = [f"{'frame':>6} {'PSNR dB':>8} {'SSIM':>7}"]
    rows: Sequence[tuple[object, float, float]] = [
        *zip(range(len(found.psnr)), found.psnr, found.ssim, strict=True),
        ("mean", float(np.mean(found.psnr)), float(np.mean(found.ssim))),
    ]
    lines += [f"{name!s:>6} {psnr:8.2f} {ssim:7.4f}" for name, psnr, ssim in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of a VAE, or of a model", required=True)
    flags.DEFINE_string("input", None, "video or image", required=True)
    flags.DEFINE_string("to", None, "mp4 or png file to write", required=True)
    flags.DEFINE_integer("frames", 0, "at most so many; 0: all", lower_bound=0)
    flags.DEFINE_integer("window", 2, "latent frames worked on at once", lower_bound=1)
    flags.DEFINE_integer("tile", None, "height and width of tiles; none: whole frames")
    flags.DEFINE_float("overlap", 0.25, "fraction of a tile shared with the next one")
    app.run(main)
