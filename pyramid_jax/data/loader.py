# SPDX-License-Identifier: Apache-2.0
"""From a manifest to an endless, resumable stream of packed training rows.

records, endlessly in new orders -> this host's share      numbers only
        -> decode, choose stage and unit, cut, tokenise    workers, records.py
        -> drop bad files, pack, batch                     a thread, packing.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from pyramid_jax import layout as layouts
from pyramid_jax.data import captions
from pyramid_jax.data.captions import Tokenised, Tokenize
from pyramid_jax.data.examples import (
    Clips,
    Curriculum,
    HeightWidth,
    Load,
    Maker,
    Pixels,
    choose,
)
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.packing import packed
from pyramid_jax.data.source import RecordSource, ahead
from pyramid_jax.layout import Layout
from pyramid_jax.shapes import Rows


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and the shape of a batch. Counts are per host.

    Args:
        height, width: of the pixels of every video and image.
        frames: pixel frames of a video.
        fps: at which they are taken from the file.
        batch: rows.
        tokens: video tokens of a row.
        text_tokens: caption tokens of a row.
        segments: most segments in a row.
        stage_shares: how many of a group of successive examples train each stage.
        temporal: train one unit with its history; False: whole sequences.
        dropout: probability of an empty caption.
        sizes: further (height, width); files get the nearest aspect ratio.
        stride: pixel frames, and pixels, per latent cell.
        workers: processes that decode; 0 decodes in this one.
        cache_mib: memory for decoded clips, per worker.
        max_bad: fraction of the manifest's files that may be unusable.
    """

    manifest: str | Path
    height: int
    width: int
    frames: int
    fps: float
    batch: int
    tokens: int
    text_tokens: int
    segments: int
    stage_shares: tuple[int, ...] = (1, 2, 1)
    temporal: bool = True
    dropout: float = 0.1
    sizes: tuple[HeightWidth, ...] = ()
    stride: tuple[int, int] = (1, 1)
    seed: int = 0
    workers: int = 0
    cache_mib: int = 512
    max_bad: float = 0.01

    def __post_init__(self):
        positive = "height width frames fps batch tokens text_tokens segments"
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected over 0")
        for name in ("sizes", "stride"):
            if np.array(getattr(self, name)).min(initial=1) < 1:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected lengths of 1 or more"
                )
        for name in ("workers", "cache_mib", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("dropout", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if min(self.stage_shares, default=-1) < 0 or not any(self.stage_shares):
            raise ValueError(
                f"stage_shares {self.stage_shares} must be counts, one per stage, not "
                "all 0, e.g. (1, 2, 1)"
            )

    @property
    def all_sizes(self) -> tuple[HeightWidth, ...]:
        """Every (height, width) that can occur."""
        return ((self.height, self.width), *self.sizes)

    @property
    def latent_frames(self) -> int:
        """Latent frames of a video."""
        return 1 + (self.frames - 1) // self.stride[0]

    @property
    def pattern(self) -> tuple[int, ...]:
        """The stages of a group of successive examples."""
        shares = enumerate(self.stage_shares)
        return tuple(stage for stage, share in shares for _ in range(share))

    def units(self, layout: Layout) -> int | None:
        """Units of a video; None if whole sequences are trained."""
        if not self.temporal:
            return None
        return layouts.units(self.latent_frames, layout.frames_per_unit)

    def plan(self, layout: Layout, shard: tuple[int, int]) -> Curriculum:
        """What each example of host `shard` = (index, count) trains."""
        stages, units = len(self.stage_shares), self.units(layout)
        return Curriculum(stages, self.pattern, units, self.dropout, self.seed, shard)


def batches(
    cfg: DataConfig,
    layout: Layout,
    tokenize: Tokenize | None,
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    load: Load | None = None,
) -> grain.DatasetIterator[Rows]:
    """An endless iterator of `Rows` in numpy; it has get_state, set_state and close.

    Args:
        tokenize: token ids of a caption, also of the empty one; picklable. None: the
            records name stored features of their captions (`data.captions`).
        folder: gets `skipped.jsonl`, a line for each file that could not be used.
        shard: index and count of the hosts; each has examples of its own.
        load: the latent "t h w c" of a record at a size, or its 8-bit pixels;
            picklable. None: the pixels of the record's file.

    Raises ValueError for a bad manifest or a budget that a segment exceeds; the
    iterator does when more files than `max_bad` are unusable.
    """
    _check_budget(cfg, layout)
    records = read_manifest(cfg.manifest)
    source = RecordSource(
        records, cfg.seed, cfg.workers, cfg.max_bad, shard, Path(folder)
    )
    load = load or Pixels(cfg.frames, cfg.fps)
    clips = Clips(load, cfg.all_sizes, len(cfg.stage_shares), cfg.cache_mib * 2**20)
    plan = cfg.plan(layout, shard)
    if tokenize is None:
        captions.check_stored(records)
    caption = captions.stored if tokenize is None else Tokenised(tokenize)
    make = Maker(clips, plan, layout, caption, cfg.tokens, cfg.text_tokens)
    budget = {"video": cfg.tokens, "text": cfg.text_tokens}
    budget |= dict.fromkeys(("stage", "pooled"), cfg.segments)
    return ahead(packed(source.examples(make), budget, cfg.batch))


class Longest(NamedTuple):
    """The segment with the most video tokens; `unit` None means all frames."""

    tokens: int
    size: HeightWidth
    stage: int
    unit: int | None


def longest(cfg: DataConfig, layout: Layout) -> Longest:
    """The longest segment that can occur.

    Raises ValueError if sizes or frames do not fit the latent cells, patches, stages
    and units.
    """
    stages, (every, cell) = len(cfg.stage_shares), cfg.stride
    multiple = cell * layout.patch * 2 ** (stages - 1)
    for size in cfg.all_sizes:
        if any(side % multiple for side in size):
            fits = [max(1, round(side / multiple)) * multiple for side in size]
            raise ValueError(
                f"height and width {size} are not multiples of {multiple} = {cell} "
                f"(latent cell) x {layout.patch} (patch) x {2 ** (stages - 1)} "
                f"(pyramid); use {fits[0]} and {fits[1]}"
            )
    if (cfg.frames - 1) % every:
        fits = 1 + (cfg.frames - 1) // every * every
        raise ValueError(
            f"{cfg.frames} frames are not 1 + a multiple of {every} (frames per latent "
            f"frame); use {fits} or {fits + every}"
        )
    units = cfg.units(layout)
    every_unit = [None] if units is None else range(units)
    return max(
        (
            Longest(_length(cfg, layout, size, stage, unit), size, stage, unit)
            for size in cfg.all_sizes
            for stage in sorted(set(cfg.pattern))
            for unit in every_unit
        ),
        key=lambda segment: segment.tokens,
    )


def _check_budget(cfg: DataConfig, layout: Layout) -> None:
    needed, (height, width), stage, unit = longest(cfg, layout)
    if needed > cfg.tokens:
        what = "all frames" if unit is None else f"unit {unit} with its history"
        raise ValueError(
            f"a row has {cfg.tokens} tokens, but {what} at stage {stage} of "
            f"{height}x{width} pixels needs {needed}; raise tokens to {needed}, or use "
            "fewer frames or a smaller size"
        )


def _length(
    cfg: DataConfig, layout: Layout, size: HeightWidth, stage: int, unit: int | None
) -> int:
    """The video tokens of a segment."""
    side = cfg.stride[1] * layout.patch
    cells = size[0] // side * (size[1] // side)
    coarsest = cells // 4 ** (len(cfg.stage_shares) - 1)
    chosen = choose(cfg.latent_frames, stage, unit, layout.frames_per_unit)
    return sum(len(clip.frame) * coarsest * 4**clip.stage for clip in chosen)
