# SPDX-License-Identifier: Apache-2.0
"""Prepares training data.

    python -m launch.prepare --embedded --to=data/shapes

writes the embedded data set: mp4 files, their manifest.jsonl and a tokenizer.json.
"""

import logging
from pathlib import Path

from absl import app, flags

from pyramid_jax.data import embedded
from pyramid_jax.data.tokenizer import train_tokenizer

EMBEDDED = flags.DEFINE_bool("embedded", False, "write the embedded data set")
TO = flags.DEFINE_string("to", None, "folder to write to", required=True)
CLIPS = flags.DEFINE_integer("clips", 3000, "clips of the embedded data set")
SEED = flags.DEFINE_integer("seed", 0, "of the embedded data set")
VOCABULARY = flags.DEFINE_integer("vocabulary", 384, "of its tokenizer")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not EMBEDDED.value:
        raise app.UsageError("give --embedded and --to=FOLDER; see --help")
    manifest = embedded.write_dataset(TO.value, CLIPS.value, SEED.value)
    captions = [caption.text for caption in embedded.captions()]
    train_tokenizer(captions, VOCABULARY.value, Path(TO.value) / "tokenizer.json")
    logging.info("%d clips: %s", CLIPS.value, manifest)


if __name__ == "__main__":
    app.run(main)
