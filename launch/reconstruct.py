# SPDX-License-Identifier: Apache-2.0
"""Shows how well a VAE reconstructs a video or an image.

    pyramid-jax reconstruct --model=runs/vae/model --input=clip.mp4 --to=out.mp4
    pyramid-jax reconstruct --model=MODEL --input=photo.jpg --to=out.png --tile=256

writes original, reconstruction and four times their difference side by side, prints
PSNR and SSIM of every frame, and writes them as JSON beside the output.
"""

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import UInt8
from matplotlib.image import imsave

from launch import start
from pyramid_jax.data import video_io
from pyramid_jax.data.pictures import SUFFIXES, picture_size, read_picture
from pyramid_jax.data.pixels import to_model, to_uint8
from pyramid_jax.latents import LatentConfig
from pyramid_jax.vae import autoencoder, quality
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Pieces

STRENGTH = 4  # of the difference


class Reconstruction(NamedTuple):
    """A video before and after the VAE, and decibels and SSIM of every frame."""

    original: UInt8[np.ndarray, "f h w 3"]
    decoded: UInt8[np.ndarray, "f h w 3"]
    psnr: list[float]
    ssim: list[float]


def main(options: flags.FlagValues) -> None:
    start.check_writable(Path(options.to).parent)
    shown_size(Path(options.input))  # raises, before a model is loaded
    vae = autoencoder.load_autoencoder(options.model)
    original, fps = read(Path(options.input), vae.latent, options.frames or None)
    pieces = Pieces(options.window * vae.latent.temporal, options.tile, options.overlap)
    result = reconstruct(vae, original, pieces)
    out = Path(options.to)
    write(out, result, fps)
    print(table(result))
    # JSON has no infinity, the PSNR of equal frames.
    psnr = [value if math.isfinite(value) else None for value in result.psnr]
    scores = {"input": options.input, "psnr": psnr, "ssim": result.ssim}
    out.with_suffix(".json").write_text(json.dumps(scores, indent=1) + "\n")
    print(out)


def shown_size(path: Path) -> tuple[int, int]:
    """Height and width of a video or image, as it is shown.

    Raises:
        ValueError: a missing or broken file.
    """
    image = path.suffix.lower() in SUFFIXES
    return picture_size(path) if image else video_io.video_size(path)


def read(
    path: Path, latent: LatentConfig, frames: int | None = None
) -> tuple[UInt8[np.ndarray, "f h w 3"], float]:
    """A file's frames in its own size, cropped to whole latents, and its frame rate.

    Args:
        frames: at most this many; None: all.

    Raises:
        ValueError: a missing or broken file, or one too small for a latent cell.
    """
    image = path.suffix.lower() in SUFFIXES
    info = None if image else video_io.video_info(path)
    shown = picture_size(path) if info is None else info[:2]
    multiple = math.lcm(latent.spatial, 2)  # H.264 wants even sizes
    size = shown[0] // multiple * multiple, shown[1] // multiple * multiple
    if not min(size):
        raise ValueError(
            f"{path} shows {shown[0]}x{shown[1]} pixels, expected at least "
            f"{multiple}x{multiple}; give a larger picture"
        )
    if info is None:
        return read_picture(path, size)[None], 1.0
    video = list(islice(video_io.video_frames(path, size, info.fps), frames))
    return np.stack(video[: latent.longest(len(video))]), info.fps


def reconstruct(
    vae: Autoencoder, original: UInt8[np.ndarray, "f h w 3"], pieces: Pieces
) -> Reconstruction:
    """A video after encoder and decoder, without noise."""
    codec, pixels = autoencoder.vae_codec(vae), to_model(original[None])
    latents = codec.encode(pixels, None, pieces)
    decoded = to_uint8(np.asarray(codec.decode(latents, pieces)))[0]
    scores = (f(pixels[0], to_model(decoded)) for f in (quality.psnr, quality.ssim))
    psnr, ssim = (np.asarray(values).tolist() for values in scores)
    return Reconstruction(original, decoded, psnr, ssim)


def write(path: Path, result: Reconstruction, fps: float) -> None:
    """Writes original, reconstruction and difference as a video, or as an image."""
    original, decoded = (x.astype(int) for x in (result.original, result.decoded))
    difference = np.clip(STRENGTH * np.abs(decoded - original), 0, 255)
    shown = np.concatenate([original, decoded, difference], axis=2).astype(np.uint8)
    if path.suffix.lower() in SUFFIXES:
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, shown[0])
    else:
        video_io.write_video(path, shown, fps)


def table(result: Reconstruction) -> str:
    """PSNR and SSIM of every frame, and their means."""
    lines = [f"{'frame':>6} {'PSNR dB':>8} {'SSIM':>7}"]
    rows: Sequence[tuple[object, float, float]] = [
        *zip(range(len(result.psnr)), result.psnr, result.ssim, strict=True),
        ("mean", float(np.mean(result.psnr)), float(np.mean(result.ssim))),
    ]
    lines += [f"{name!s:>6} {psnr:8.2f} {ssim:7.4f}" for name, psnr, ssim in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Folder of a VAE, or of a model.", required=True)
    flags.DEFINE_string("input", None, "Video or image to read.", required=True)
    flags.DEFINE_string("to", None, "File to write, mp4 or png.", required=True)
    flags.DEFINE_integer("frames", 0, "Read at most so many; 0: all.", lower_bound=0)
    flags.DEFINE_integer("window", 2, "Latent frames worked on at once.", lower_bound=1)
    flags.DEFINE_integer("tile", None, "Side of tiles in pixels; none: whole frames.")
    flags.DEFINE_float("overlap", 0.25, "Share of a tile that the next one has, too.")
    start.run(main, headings={"model": "files", "frames": "how much at once"})
