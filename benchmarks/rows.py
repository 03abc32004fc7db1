# SPDX-License-Identifier: Apache-2.0
"""How full packed rows are on the released mixtures, and how evenly devices compute.

    python -m benchmarks.rows --to=benchmarks/results/rows.json

The loader's own packing fills rows with segments that have the lengths of real ones,
as many rows as the config's batch has, each with its share of the examples. A step
takes those of its device at once, on as many devices as the config's machine has, so
its slowest device is the one whose rows have the most attention.
Ends with 1 if more than 8 % of the places stay empty, or if a step's slowest device
computes over 10 % more than the mean.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import app, flags

from launch.config_flag import ConfigParser
from pyramid_jax import flops
from pyramid_jax import model as models
from pyramid_jax.convert.source import abstract_weights
from pyramid_jax.data.examples import DataConfig, segment_clips, stage_of, unit_of
from pyramid_jax.data.packing import packed_pairs, packed_rows
from pyramid_jax.layout import Segment
from pyramid_jax.sharding import unbox
from pyramid_jax.train import data_config

MOST_EMPTY, MOST_UNEVEN = 0.08, 0.10
ROUNDS = 2  # of every row's stream
DEVICES = {"v5p:4x4x4": 64, "h200x8": 8}  # of the machines of configs


class Mixture(NamedTuple):
    """What is trained: a config, words of captions, the share of images."""

    config: str
    words: tuple[int, int]
    images: float


FULL, REAL = (128, 128), (20, 128)  # words: all captions as long as may be, or not
MIXTURES = (
    Mixture("mmdit_384p", FULL, 0.0),
    Mixture("mmdit_384p", REAL, 0.125),
    Mixture("mmdit_768p", FULL, 0.0),
    Mixture("mmdit_768p", REAL, 0.125),
    Mixture("flux_768p", REAL, 0.125),
    Mixture("mmdit_384p:short", REAL, 0.125),
    Mixture("flux_384p:short", REAL, 0.125),
)


class Examples(grain.IterDataset):
    """The lengths of the examples of a row's stream, without end."""

    def __init__(self, cfg: DataConfig, mixture: Mixture, row: int):
        super().__init__()
        self._arguments = cfg, mixture, row

    def __iter__(self) -> Any:
        return _ExampleIterator(lengths(*self._arguments))


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, examples: Iterator[dict[str, np.ndarray]]):
        super().__init__()
        self._examples = examples

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._examples)

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        raise NotImplementedError("a benchmark is not resumed")


def lengths(
    cfg: DataConfig, mixture: Mixture, row: int
) -> Iterator[dict[str, np.ndarray]]:
    """Examples whose arrays are as long as those of real ones, and otherwise empty."""
    random = np.random.default_rng(row)
    grid = cfg.latent.grid(cfg.height, cfg.width, cfg.layout.patch, 3)
    finest = grid[0] * grid[1] // cfg.layout.patch**2
    low, high = mixture.words
    for number in itertools.count(row, cfg.batch):
        count = 1 if random.random() < mixture.images else cfg.latent_frames
        stage = stage_of(cfg, number)
        unit = unit_of(cfg, number, count)
        clips = segment_clips(count, stage, unit, cfg.layout)
        sizes = [finest // 4 ** (2 - x.stage) for x in clips for _ in x.frame]
        frame = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
        empty = np.zeros(len(frame), np.int8)
        words = np.zeros(int(random.integers(low, high + 1)), np.int8)
        one = np.zeros(1, np.int8)
        fields = dict.fromkeys(Segment._fields, empty) | {"frame": frame}
        yield fields | {"text": words, "stage": one, "pooled": one}


def measured(mixture: Mixture) -> dict[str, Any]:
    """What is empty in the rows of all devices, and how uneven their steps are."""
    cfg = ConfigParser("config").parse(mixture.config)
    devices = DEVICES[cfg.machine]
    model = models.model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    count = ROUNDS * data.open_rows
    rows = [
        list(itertools.islice(packed_rows(Examples(data, mixture, n), data, n), count))
        for n in range(data.batch)
    ]
    cost = flops.row_cost(model, {"dit": unbox(abstract_weights(model.dit))})
    # Places that are empty are computed, too.
    products = cost.products(data.text_tokens, data.tokens, data.segments)
    pairs = np.array([[packed_pairs(row) for row in of] for of in rows])
    work = products + cost.pair * pairs
    work = work.reshape(devices, -1, count).sum(axis=1)
    uneven = work.max(0) / work.mean(0) - 1
    used = [np.mean(row["frame_segment_ids"] > 0) for of in rows for row in of]
    return {
        "config": mixture.config,
        "words": mixture.words,
        "images": mixture.images,
        "devices": devices,
        "rows": len(used),
        "empty": _rounded(1 - np.mean(used)),
        "uneven_mean": _rounded(uneven.mean()),
        "uneven_most": _rounded(uneven.max()),
    }


def _rounded(x: Any) -> float:
    return round(float(x), 4)


def main(_: object) -> None:
    found = [measured(mixture) for mixture in MIXTURES]
    print("| config | devices | words | images | empty | uneven, mean | most |")
    print("|---|---|---|---|---|---|---|")
    for x in found:
        print(
            f"| {x['config']} | {x['devices']} | {x['words'][0]} to {x['words'][1]} "
            f"| {x['images']:.1%} "
            f"| {x['empty']:.1%} | {x['uneven_mean']:.1%} | {x['uneven_most']:.1%} |"
        )
    if path := flags.FLAGS.to:
        about = {"jax": jax.__version__}
        text = json.dumps(about | {"mixtures": found}, indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")
    empty = max(x["empty"] for x in found)
    if empty > MOST_EMPTY or max(x["uneven_most"] for x in found) > MOST_UNEVEN:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("to", None, "File to write the result to, as JSON.")
    app.run(main)
