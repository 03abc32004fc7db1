# SPDX-License-Identifier: Apache-2.0
r"""Prepares training data: the embedded data sets, features of captions, latents.

    python -m launch.prepare --embedded --to=data/shapes
    python -m launch.prepare --pairs --clips=12000 --to=data/pairs

write the moving shapes and the bouncing pairs: mp4 files (of the pairs also images),
their manifest.jsonl and a tokenizer.json. `--held_out` writes other pairs, whose scans
of digits are not in the training data.

    python -m launch.prepare --text --model=MODEL --manifest=clips.jsonl --to=data/text

writes the features of all captions of a manifest and of the empty caption, from the
text encoders in the folder of a released model, and a manifest.jsonl that names them.

    python -m launch.prepare --latents --model=MODEL --manifest=clips.jsonl \
        --to=data/latents --sizes=384x640 --frames=121 --fps=24

writes the latents of all videos and images, drawn by the VAE in the folder of a model,
and a manifest.jsonl that names them.
"""

import hashlib
import logging
from functools import partial
from pathlib import Path

import jax
from absl import app, flags

from launch import moving_shapes, start
from launch.pairs import dataset
from launch.pairs.scene import Settings
from launch.prepare.storage import LatentJob, write_features, write_latents
from launch.sizes import height_width
from pyramid_jax import sharding
from pyramid_jax.data.source import read_pixels
from pyramid_jax.pipeline import prompts
from pyramid_jax.vae import autoencoder

BEGINNING = 2**22  # bytes of a file of weights that tell it from others

EMBEDDED = flags.DEFINE_bool("embedded", False, "write clips of moving shapes")
PAIRS = flags.DEFINE_bool("pairs", False, "write clips and images of bouncing pairs")
HELD_OUT = flags.DEFINE_bool("held_out", False, "of the pairs' held-out split")
TEXT = flags.DEFINE_bool("text", False, "write features of captions")
LATENTS = flags.DEFINE_bool("latents", False, "write latents of videos and images")
TO = flags.DEFINE_string("to", None, "folder to write to", required=True)
CLIPS = flags.DEFINE_integer("clips", 3000, "files of a drawn data set")
SEED = flags.DEFINE_integer(
    "seed", 0, "seed of a drawn data set, or of the noise in latents"
)
VOCABULARY = flags.DEFINE_integer(
    "vocabulary", None, "vocabulary of its tokenizer; 384 for shapes, 512 for pairs"
)
MANIFEST = flags.DEFINE_string("manifest", None, "manifest whose records are encoded")
MODEL = flags.DEFINE_string("model", None, "folder of a released model, or of a VAE")
BATCH = flags.DEFINE_integer(
    "batch", None, "how many are encoded at once; 16 captions, or a video per device"
)
DTYPE = flags.DEFINE_string(
    "dtype", "bfloat16", "number type of the encoders' matrix products"
)
SIZES = flags.DEFINE_list(
    "sizes", ["384x640"], "HEIGHTxWIDTH of videos; files get the nearest aspect ratio"
)
FRAMES = flags.DEFINE_integer(
    "frames", None, "frames of a video; 17 for pairs, 121 for latents"
)
FPS = flags.DEFINE_float("fps", 24, "frames per second that are taken from files")
MAX_BAD = flags.DEFINE_float("max_bad", 0.01, "fraction of files that may be unusable")


def main(_: flags.FlagValues) -> None:
    if EMBEDDED.value + PAIRS.value + TEXT.value + LATENTS.value != 1:
        raise app.UsageError(
            "give --embedded, --pairs, --text or --latents, and --to=FOLDER; see --help"
        )
    if EMBEDDED.value or PAIRS.value:
        draw = prepare_embedded if EMBEDDED.value else prepare_pairs
        draw()
        return
    if MANIFEST.value is None or MODEL.value is None:
        raise app.UsageError("this needs --manifest=FILE and --model=FOLDER")
    prepare = prepare_text if TEXT.value else prepare_latents
    prepare(MANIFEST.value, MODEL.value)


def prepare_embedded() -> None:
    """Writes the moving shapes, as the flags say."""
    manifest = moving_shapes.write_dataset(TO.value, CLIPS.value, SEED.value)
    texts = [caption.text for caption in moving_shapes.captions()]
    tokenizer = Path(TO.value) / "tokenizer.json"
    moving_shapes.train_tokenizer(texts, VOCABULARY.value or 384, tokenizer)
    logging.info("%d clips: %s", CLIPS.value, manifest)


def prepare_pairs() -> None:
    """Writes bouncing pairs, as the flags say."""
    split = "held out" if HELD_OUT.value else "training"
    settings = Settings(FRAMES.value or 17)
    manifest = dataset.write_pairs(TO.value, CLIPS.value, SEED.value, split, settings)
    tokenizer = Path(TO.value) / "tokenizer.json"
    texts = dataset.texts()
    moving_shapes.train_tokenizer(texts, VOCABULARY.value or 512, tokenizer)
    logging.info("%d clips and images: %s", CLIPS.value, manifest)


def prepare_text(manifest: str, model: str) -> None:
    """Writes features of captions, as the flags say."""
    mesh = sharding.device_mesh(data=1, fsdp=len(jax.devices()))
    encode = prompts.load_prompt_encoder(model, DTYPE.value, mesh)
    made_with = {"model": text_encoders(Path(model)), "dtype": DTYPE.value}
    batch = BATCH.value or 16
    prepared = write_features(manifest, TO.value, encode, batch, made_with)
    logging.info("features of all captions: %s", prepared)


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
    job = LatentJob(
        encode=autoencoder.raw_encoder(vae, SEED.value, mesh),
        load=partial(read_pixels, frames=frames, fps=FPS.value),
        sizes=tuple(height_width(text) for text in SIZES.value),
        made_with={
            "frames": frames,
            "fps": FPS.value,
            "seed": SEED.value,
            "vae": vae.digest,
        },
        batch=BATCH.value or devices,
        max_bad=MAX_BAD.value,
    )
    prepared = write_latents(manifest, TO.value, job)
    logging.info("latents of all records: %s", prepared)


if __name__ == "__main__":
    start.run(main)
