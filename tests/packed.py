# SPDX-License-Identifier: Apache-2.0
"""Small data sets and packed rows for the tests of the data pipeline."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from pyramid_jax import layout
from pyramid_jax.data.examples import DataConfig
from pyramid_jax.data.loader import batches
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.video_io import write_video
from pyramid_jax.layout import Layout
from pyramid_jax.shapes import Rows

LAYOUT = Layout(patch=2)
SEQUENCES = replace(LAYOUT, history="none")
FRAMES, SIZE, STAGES = 4, (16, 16), 3


def tokenize(text: str) -> list[int]:
    """The words of a caption, which are numbers here, after a 1."""
    return [1, *(int(word) for word in text.split())]


def synthetic(record: Record, sizes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """A latent whose values differ everywhere, made from the record's caption."""
    rng = np.random.default_rng(int(record.text.split()[0]))
    frames = 1 if record.kind == "image" else FRAMES
    return rng.standard_normal((frames, *sizes[0], 3), np.float32)


class Part:
    """The part of one row that belongs to one segment."""

    def __init__(self, rows: Rows, row: int, index: int):
        mine = rows.segment[row] == index
        self.tokens = layout.Segment(
            *(field[row][mine] for field in (rows.clean, rows.coarser, rows.position)),
            *(field[row][mine] for field in (rows.frame, rows.current)),
        )
        self.text = rows.text[row][rows.text_segment[row] == index].tolist()
        self.stage = int(rows.stage[row, index])

    @property
    def unit(self) -> int:
        """The unit, where a unit is one frame."""
        return int(self.tokens.frame.max())


def parts(rows: Rows) -> Iterator[Part]:
    for row, index in zip(*np.nonzero(rows.stage >= 0), strict=True):
        yield Part(rows, row, index)


def assert_equal(a: Rows, b: Rows) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def opened(cfg: DataConfig, folder: Path, **options):
    """The iterator of a config, closed at the end; latents are synthetic by default."""
    options = {"load": synthetic, "tokenize": tokenize} | options
    iterator = batches(cfg, folder=folder, **options)
    try:
        yield iterator
    finally:
        iterator.close()


def take(count: int, cfg: DataConfig, folder: Path, **options) -> list[Rows]:
    with opened(cfg, folder, **options) as iterator:
        return list(itertools.islice(iterator, count))


def taken_parts(count: int, cfg: DataConfig, folder: Path, **options) -> list[Part]:
    """Parts in the order of the examples, if a row has one segment only."""
    return [
        part for rows in take(count, cfg, folder, **options) for part in parts(rows)
    ]


def config(folder: Path, records: list[Record] | None = None, **changes) -> DataConfig:
    """A config with a manifest of its own: by default 12 videos, captions 10 to 21."""
    if records is None:
        records = [Record(folder / f"{i}.mp4", "video", str(10 + i)) for i in range(12)]
    write_manifest(folder / "manifest.jsonl", records)
    cfg = DataConfig(
        manifest=folder / "manifest.jsonl",
        height=SIZE[0],
        width=SIZE[1],
        frames=FRAMES,
        fps=8,
        batch=2,
        tokens=300,
        text_tokens=12,
        segments=5,
        dropout=0.0,
        open_rows=8,
        layout=LAYOUT,
    )
    cfg = replace(cfg, **changes)
    # Rows of one segment are in the order of the examples where none are sorted.
    return replace(cfg, open_rows=1) if cfg.segments == 1 else cfg


def write_clips(folder: Path, count: int, size: tuple[int, int] = SIZE) -> list[Record]:
    """Real files of plain colours."""
    records = []
    for i in range(count):
        video = np.full((FRAMES, *size, 3), 20 * i + 20, np.uint8)
        path = folder / f"{size[0]}x{size[1]}_{i}.mp4"
        write_video(path, video, 8)
        records.append(Record(path, "video", str(10 + i)))
    return records
