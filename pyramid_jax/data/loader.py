# SPDX-License-Identifier: Apache-2.0
"""From a manifest to an endless, resumable stream of packed training rows.

records, endlessly in new orders -> the share of a row       source.py
        -> decode, choose stage and unit, cut, tokenise      workers, examples.py
        -> drop bad files, pack                              a thread
        -> side by side, the rows of this host               the same

The state of every row is a few numbers: how many messages of the workers are used up,
and the place in the last one and in the rows packed from it. It is the same whichever
host makes the row, so a run is continued on any number of them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from pyramid_jax.data.examples import (
    DataConfig,
    Example,
    LoadLatent,
    latent_loader,
    load_levels,
    make_example,
    segment_clips,
)
from pyramid_jax.data.kept import KeptBatches
from pyramid_jax.data.manifest import Split, split_records
from pyramid_jax.data.mixture import Mixture
from pyramid_jax.data.packing import packed_rows
from pyramid_jax.data.pixels import HeightWidth
from pyramid_jax.data.source import ArrayCache, Together, in_advance, read_examples
from pyramid_jax.data.stored import check_features, read_records
from pyramid_jax.data.tokenizer import Tokenize
from pyramid_jax.shapes import Rows


def batches(
    cfg: DataConfig,
    tokenize: Tokenize | None,
    folder: str | Path,
    rows: Sequence[int] | None = None,
    *,
    load: LoadLatent | None = None,
    split: Split = "training",
) -> grain.DatasetIterator[Rows]:
    """An endless iterator of `Rows` in numpy; it has get_state, set_state and close.

    Args:
        tokenize: token ids of a caption, also of the empty one; picklable. None: the
            records name stored features of their captions (`data.stored`).
        folder: gets `skipped.jsonl`, a line for each file that could not be used.
        rows: those of the batch that this process makes; None: all.
        load: the latent of a record; picklable. None: as `latent_loader` says.
        split: which part of the manifest is read; see `DataConfig.held_out`.

    Raises:
        ValueError: a bad manifest, or a budget that a segment exceeds; the iterator
            raises when more files than `max_bad` are unusable.
    """
    _check_budget(cfg)
    records = split_records(read_records(cfg.manifest), cfg.held_out, split)
    beside = cfg.images and split == "training"
    images = read_records(cfg.images) if beside else None
    if tokenize is None:
        for kind in (records, images):
            if kind is not None:
                check_features(kind)
    mixed = records if images is None else Mixture(records, images, cfg.image_share)
    cache = ArrayCache(cfg.cache_mib * 2**20)
    levels = partial(load_levels, cfg, load or latent_loader(cfg), cache)
    make = partial(make_example, cfg, tokenize, levels)
    rows = range(cfg.batch) if rows is None else rows
    streams = read_examples(make, mixed, cfg, folder, rows, cfg.batch)
    packed = {str(n): packed_rows(stream, cfg, n) for n, stream in streams.items()}
    made = in_advance(Together(packed).map(_rows))
    return KeptBatches(made, cfg.kept, cfg.seed) if cfg.kept else made


class Longest(NamedTuple):
    """The segment with the most video tokens; `unit` None means all frames."""

    tokens: int
    size: HeightWidth
    stage: int
    unit: int | None


def longest(cfg: DataConfig) -> Longest:
    """The longest segment that can occur.

    Raises:
        ValueError: sizes or frames do not fit the latent cells, patches, stages and
            units.
    """
    every_unit = [None] if cfg.units is None else range(cfg.units)
    segments = product(cfg.all_sizes, sorted(set(cfg.pattern)), every_unit)
    lengths = (Longest(_length(cfg, *segment), *segment) for segment in segments)
    return max(lengths, key=lambda longest: longest.tokens)


def _check_budget(cfg: DataConfig) -> None:
    needed, (height, width), stage, unit = longest(cfg)
    if needed > cfg.tokens:
        what = "all frames" if unit is None else f"unit {unit} with its history"
        raise ValueError(
            f"a row has {cfg.tokens} tokens, but {what} at stage {stage} of "
            f"{height}x{width} pixels needs {needed}; raise tokens to {needed}, or use "
            "fewer frames or a smaller size"
        )


def _length(cfg: DataConfig, size: HeightWidth, stage: int, unit: int | None) -> int:
    """The video tokens of a segment."""
    patch, stages = cfg.layout.patch, len(cfg.stage_shares)
    height, width = cfg.latent.grid(*size, patch, stages)
    coarsest = height * width // (patch * 2 ** (stages - 1)) ** 2
    clips = segment_clips(cfg.latent_frames, stage, unit, cfg.layout)
    return sum(len(clip.frame) * coarsest * 4**clip.stage for clip in clips)


def _rows(packed: dict[str, dict[str, np.ndarray]]) -> Rows:
    """`Rows` side by side. Grain counts segments from 1, 0 is padding."""
    fields = {
        name: np.stack([row[name] for row in packed.values()])
        for name in (*Example._fields, "frame_segment_ids", "text_segment_ids")
    }
    return Rows(
        **{name: fields[name] for name in Example._fields},
        segment=fields["frame_segment_ids"] - 1,
        text_segment=fields["text_segment_ids"] - 1,
    )
