# SPDX-License-Identifier: Apache-2.0
r"""Prepares training data: manifests, features of captions, latents.

    pyramid-jax prepare --folder=clips --to=data/mine

writes a manifest.jsonl of the videos and images in a folder, each of which has its
caption in a text file of the same name: waves.mp4 and waves.txt.

    pyramid-jax prepare --embedded --to=data/shapes
    pyramid-jax prepare --pairs --clips=12000 --to=data/pairs

write the moving shapes and the bouncing pairs: mp4 files (of the pairs also images),
their manifest.jsonl and a tokenizer.json. `--held_out` writes other pairs, whose scans
of digits are not in the training data. With `--model=MODEL`, pairs are encoded by its
VAE as they are drawn, and only their latents are written.

    pyramid-jax prepare --text --model=MODEL --manifest=clips.jsonl --to=data/text

writes the features of all captions of a manifest and of the empty caption, from the
text encoders in the folder of a released model, and a manifest.jsonl that names them.

    pyramid-jax prepare --latents --model=MODEL --manifest=clips.jsonl \
        --to=data/latents --sizes=384x640 --frames=121 --fps=24

writes the latents of all videos and images, drawn by the VAE in the folder of a model,
and a manifest.jsonl that names them. With --shard=3/8 as well, it writes one of eight
shards: few large files that hold latents, captions and their features. Each shard may
be written on a host of its own; start a command that was killed again.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import moving_shapes, start
from launch.pairs import dataset
from launch.pairs.latents import write_pair_latents
from launch.pairs.scene import Settings
from launch.prepare.captioned import list_folder
from launch.prepare.shards import without_cuts, write_shard
from launch.prepare.storage import LatentJob, write_features, write_latents
from launch.sizes import height_width
from pyramid_jax import sharding
from pyramid_jax.data.manifest import Record, read_manifest
from pyramid_jax.data.pixels import HeightWidth
from pyramid_jax.data.source import read_pixels
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.request import SEEDS
from pyramid_jax.vae import autoencoder

BEGINNING = 2**22  # bytes of a file of weights that tell it from others

FOLDER = flags.DEFINE_string(
    "folder", None, "List the videos and images of this folder with their captions."
)
EMBEDDED = flags.DEFINE_bool("embedded", False, "Write clips of moving shapes.")
PAIRS = flags.DEFINE_bool("pairs", False, "Write clips and images of bouncing pairs.")
TEXT = flags.DEFINE_bool("text", False, "Write the features of captions.")
LATENTS = flags.DEFINE_bool("latents", False, "Write latents of videos and images.")
TO = flags.DEFINE_string("to", None, "Folder to write to.", required=True)
CLIPS = flags.DEFINE_integer("clips", 3000, "Clips to draw.")
HELD_OUT = flags.DEFINE_bool("held_out", False, "Draw those that are not trained on.")
VOCABULARY = flags.DEFINE_integer(
    "vocabulary", None, "Vocabulary of the tokenizer; none: 384, or 512 for pairs."
)
MANIFEST = flags.DEFINE_string("manifest", None, "Manifest whose records are encoded.")
MODEL = flags.DEFINE_string("model", None, "Folder of a released model, or of a VAE.")
BATCH = flags.DEFINE_integer(
    "batch", None, "Encode so many at once; none: 16 captions, or a video per device."
)
DTYPE = flags.DEFINE_string(
    "dtype", "bfloat16", "Number type of the text encoders' matrix products."
)
SIZES = flags.DEFINE_list(
    "sizes", ["384x640"], "HEIGHTxWIDTH of latents; each file gets the nearest shape."
)
FRAMES = flags.DEFINE_integer(
    "frames", None, "Frames of a video; none: 121, or 17 for pairs."
)
LEAST = flags.DEFINE_integer(
    *("least_frames", None, "Keep shorter videos that have so many; none: leave out."),
    lower_bound=1,
)
FPS = flags.DEFINE_float("fps", 24, "Frames per second that are taken from files.")
SEED = flags.DEFINE_integer(
    *("seed", 0, "Seed of a drawn data set, or of the noise in latents."),
    lower_bound=0,
    upper_bound=SEEDS - 1,
)
SHARD = flags.DEFINE_string(
    "shard", None, "Write shard INDEX/COUNT of the latents, e.g. 3/8 of 0/8 to 7/8."
)
MOST_CHANGE = flags.DEFINE_float(
    *("most_change", None, "Leave out videos with a cut: pixels change more, of 255."),
    lower_bound=0,
)
MAX_BAD = flags.DEFINE_float("max_bad", 0.01, "Share of files that may be unusable.")
HEADINGS = {
    "folder": "what to write, one of these",
    "to": "where",
    "clips": "with --embedded and --pairs",
    "manifest": "with --text and --latents",
    "sizes": "with --latents",
}


def main(_: flags.FlagValues) -> None:
    drawn = EMBEDDED.value, PAIRS.value
    modes = *drawn, TEXT.value, LATENTS.value, FOLDER.value is not None
    if sum(modes) != 1:
        raise ValueError(
            "give one of --folder=FOLDER, --embedded, --pairs, --text and --latents; "
            "see --help"
        )
    if FOLDER.value is not None:
        print(f"the manifest: {list_folder(FOLDER.value, TO.value)}")
        return
    if any(drawn):
        draw = prepare_embedded if EMBEDDED.value else prepare_pairs
        draw()
        return
    if MANIFEST.value is None or MODEL.value is None:
        raise ValueError("this needs --manifest=FILE and --model=FOLDER")
    start.check_writable(TO.value)
    read_manifest(MANIFEST.value)  # raises, before a model is loaded
    prepare = prepare_text if TEXT.value else prepare_latents
    prepare(MANIFEST.value, MODEL.value)


def prepare_embedded() -> None:
    """Writes the moving shapes, as the flags say."""
    manifest = moving_shapes.write_dataset(TO.value, CLIPS.value, SEED.value)
    texts = [caption.text for caption in moving_shapes.captions()]
    tokenizer = Path(TO.value) / "tokenizer.json"
    moving_shapes.train_tokenizer(texts, VOCABULARY.value or 384, tokenizer)
    print(f"{CLIPS.value} clips: {manifest}")


def prepare_pairs() -> None:
    """Writes bouncing pairs, as the flags say."""
    split = "held out" if HELD_OUT.value else "training"
    settings = Settings(FRAMES.value or 17)
    if MODEL.value is not None:
        vae = autoencoder.load_autoencoder(MODEL.value)
        manifest = write_pair_latents(
            *(TO.value, CLIPS.value, vae, settings),
            seed=SEED.value,
            split=split,
            batch=BATCH.value or 32,
            workers=max(1, (os.cpu_count() or 1) - 1),
        )
        print(f"latents of {CLIPS.value} clips and images: {manifest}")
        return
    manifest = dataset.write_pairs(TO.value, CLIPS.value, SEED.value, split, settings)
    tokenizer = Path(TO.value) / "tokenizer.json"
    texts = dataset.texts()
    moving_shapes.train_tokenizer(texts, VOCABULARY.value or 512, tokenizer)
    print(f"{CLIPS.value} clips and images: {manifest}")


def prepare_text(manifest: str, model: str) -> None:
    """Writes features of captions, as the flags say."""
    mesh = sharding.device_mesh(data=1, fsdp=len(jax.devices()))
    encode = prompts.load_prompt_encoder(model, DTYPE.value, mesh)
    made_with = {"model": text_encoders(Path(model)), "dtype": DTYPE.value}
    batch = BATCH.value or 16
    prepared = write_features(manifest, TO.value, encode, batch, made_with)
    print(f"features of all captions: {prepared}")


def text_encoders(model: Path) -> str:
    """A hash of what tells the text encoders of one model from those of another."""
    hashed = hashlib.blake2b(digest_size=8)
    for file in sorted(model.glob("text_encoder*/*")):
        with file.open("rb") as content:
            hashed.update(f"{file.name} {file.stat().st_size}".encode())
            hashed.update(content.read(BEGINNING))
    return hashed.hexdigest()


def prepare_latents(manifest: str, model: str) -> None:
    """Writes latents of videos and images, as the flags say."""
    devices, frames = len(jax.devices()), FRAMES.value or 121
    mesh = sharding.device_mesh() if devices > 1 else None
    vae = autoencoder.load_autoencoder(model)
    vae.latent.frames(frames)  # raises
    read = partial(read_pixels, frames=frames, fps=FPS.value, least=LEAST.value)
    shorter = {} if LEAST.value is None else {"least_frames": LEAST.value}
    job = LatentJob(
        encode=autoencoder.raw_encoder(vae, SEED.value, mesh),
        load=partial(single_shot, read, vae.latent.longest, MOST_CHANGE.value),
        sizes=tuple(height_width(text) for text in SIZES.value),
        made_with={
            "frames": frames,
            "fps": FPS.value,
            "seed": SEED.value,
            "vae": vae.digest,
            **shorter,
        },
        batch=BATCH.value or devices,
        max_bad=MAX_BAD.value,
    )
    if SHARD.value is not None:
        prepared = write_shard(manifest, TO.value, job, shard_of(SHARD.value))
        print(f"the shard is whole: {prepared}")
        return
    prepared = write_latents(manifest, TO.value, job)
    print(f"latents of all records: {prepared}")


def single_shot(
    read: Callable[[Record, HeightWidth], np.ndarray],
    longest: Callable[[int], int],
    most_change: float | None,
    record: Record,
    size: HeightWidth,
) -> np.ndarray:
    """The pixels of a record, which has no cut if changes are limited.

    Args:
        longest: how many of so many frames make whole latent frames.
    """
    pixels = read(record, size)
    pixels = pixels[: longest(len(pixels))]
    return pixels if most_change is None else without_cuts(pixels, most_change)


def shard_of(text: str) -> tuple[int, int]:
    """Index and count from a text such as "3/8".

    Raises:
        ValueError: anything else.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard={text} is not INDEX/COUNT; give e.g. 3/8")
    return int(index), int(count)


if __name__ == "__main__":
    start.run(main, headings=HEADINGS)
