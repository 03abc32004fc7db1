# SPDX-License-Identifier: Apache-2.0
"""Prepares training data.

    python -m launch.prepare --embedded --to=data/shapes

writes the embedded data set: mp4 files, their manifest.jsonl and a tokenizer.json.

    python -m launch.prepare --text --model=MODEL --manifest=clips.jsonl --to=data/text

writes the features of all captions of a manifest and of the empty caption, from the
text encoders in the folder of a released model, and a manifest.jsonl that names them.
"""

import logging
from pathlib import Path

import jax
from absl import app, flags

from pyramid_jax import prompts, sharding
from pyramid_jax.data import captions, embedded
from pyramid_jax.data.tokenizer import train_tokenizer

EMBEDDED = flags.DEFINE_bool("embedded", False, "write the embedded data set")
TEXT = flags.DEFINE_bool("text", False, "write features of captions")
TO = flags.DEFINE_string("to", None, "folder to write to", required=True)
CLIPS = flags.DEFINE_integer("clips", 3000, "clips of the embedded data set")
SEED = flags.DEFINE_integer("seed", 0, "of the embedded data set")
VOCABULARY = flags.DEFINE_integer("vocabulary", 384, "of its tokenizer")
MANIFEST = flags.DEFINE_string("manifest", None, "whose captions are encoded")
MODEL = flags.DEFINE_string("model", None, "folder of a released model")
BATCH = flags.DEFINE_integer("batch", 16, "captions that are encoded at once")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of the encoders' matrix products")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or EMBEDDED.value == TEXT.value:
        raise app.UsageError("give --embedded or --text, and --to=FOLDER; see --help")
    if EMBEDDED.value:
        manifest = embedded.write_dataset(TO.value, CLIPS.value, SEED.value)
        texts = [caption.text for caption in embedded.captions()]
        train_tokenizer(texts, VOCABULARY.value, Path(TO.value) / "tokenizer.json")
        logging.info("%d clips: %s", CLIPS.value, manifest)
        return
    if MANIFEST.value is None or MODEL.value is None:
        raise app.UsageError("--text needs --manifest=FILE and --model=FOLDER")
    over = sharding.mesh(data=1, fsdp=len(jax.devices()))
    encode = prompts.load(MODEL.value, DTYPE.value, over)
    manifest = captions.write(MANIFEST.value, TO.value, encode, BATCH.value)
    logging.info("features of all captions: %s", manifest)


if __name__ == "__main__":
    app.run(main)
