# SPDX-License-Identifier: Apache-2.0
"""From a record of the manifest to one clean training example: what a data worker does.

The number of an example alone decides its stage, its unit and whether it has a caption,
so a run can be repeated, divided among hosts and workers, and resumed.
"""

import zlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from pyramid_jax import layout as layouts
from pyramid_jax import pyramid
from pyramid_jax.config import check_entries
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.pixels import HeightWidth, to_model
from pyramid_jax.data.source import (
    ArrayCache,
    SourceConfig,
    nearest,
    nearest_size,
    read_pixels,
)
from pyramid_jax.data.stored import read_record_latent, stored_features
from pyramid_jax.data.tokenizer import Tokenize
from pyramid_jax.latents import LatentConfig, RawEncoder
from pyramid_jax.layout import Clip, Layout

# The normalised latent "t h w c" of a record, made at the nearest of some sizes.
LoadLatent = Callable[[Record, tuple[HeightWidth, ...]], np.ndarray]
# The pyramid of a record's latent, coarsest level "t h w c" first.
LoadLevels = Callable[[Record], list[np.ndarray]]

_PIXELS = LatentConfig(3, 1, 1, 0.0, 1.0, 0.0, 1.0)  # as they are


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """What to train on, and the shape of a batch.

    Args:
        tokens: video tokens of a row.
        text_tokens: caption tokens of a row.
        segments: most segments in a row.
        stage_shares: how many of a group of successive examples train each stage.
        dropout: probability of an empty caption.
        sizes: further (height, width); files get the nearest aspect ratio.
        least_frames: videos with fewer than `frames` are trained as long as they are,
            if they have so many; 0: none may be shorter.
        open_rows: rows of a stream that are filled at once; more of them leave fewer
            places empty, and are all in memory.
        paired: rows 2k and 2k + 1 of the batch are one device's, as where each gets two
            rows or four; their sums of attention are made even, not each row's.
        kept: batches that are made once, stay in the host's memory and are repeated in
            ever new orders; 0: every batch is new. For small data and fast devices.
        encode: files are encoded by the VAE of a model in a latent space while it is
            trained, by threads; otherwise their latents are stored.
        images: a second manifest, of images beside the videos; "": none.
        image_share: how many of the examples are its images, where there is one.
        latent, layout: of the model; by default its latents are pixels as they are.

    Raises:
        ValueError: a value is out of range.
    """

    tokens: int
    text_tokens: int
    segments: int
    _: KW_ONLY
    stage_shares: tuple[int, ...] = (1, 2, 1)
    dropout: float = 0.1
    sizes: tuple[HeightWidth, ...] = ()
    least_frames: int = 0
    open_rows: int = 32
    paired: bool = False
    kept: int = 0
    encode: bool = False
    images: str | Path = ""
    image_share: float = 0.125
    latent: LatentConfig = _PIXELS
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self):
        super().__post_init__()
        budget = ("tokens", "text_tokens", "segments", "open_rows")
        check_entries(self, lambda x: x > 0, "over 0", *budget)
        check_entries(self, lambda x: x >= 0, "0 or more", "kept")
        check_entries(self, lambda x: 0 <= x <= 1, "0 to 1", "dropout", "image_share")
        if not 0 <= self.least_frames <= self.frames:
            raise ValueError(
                f"least_frames {self.least_frames} must be 0 to {self.frames} (frames)"
            )
        if np.array(self.sizes).min(initial=1) < 1:
            raise ValueError(f"sizes {self.sizes}: expected lengths of 1 or more")
        if min(self.stage_shares, default=-1) < 0 or not any(self.stage_shares):
            raise ValueError(
                f"stage_shares {self.stage_shares} must be counts, one per stage, not "
                "all 0, e.g. (1, 2, 1)"
            )

    @property
    def threads(self) -> bool:
        """Whether workers are threads, which may use the devices, and not processes."""
        return self.encode

    @property
    def all_sizes(self) -> tuple[HeightWidth, ...]:
        """Every (height, width) that can occur."""
        return ((self.height, self.width), *self.sizes)

    @property
    def latent_frames(self) -> int:
        """Latent frames of a video."""
        return self.latent.frames(self.frames)

    @property
    def least(self) -> int:
        """Frames of the shortest video that is used."""
        return self.least_frames or self.frames

    @property
    def pattern(self) -> tuple[int, ...]:
        """The stages of a group of successive examples."""
        shares = enumerate(self.stage_shares)
        return tuple(stage for stage, share in shares for _ in range(share))

    @property
    def units(self) -> int | None:
        """Units of a video; None if whole sequences are trained."""
        if self.layout.history == layouts.NONE:
            return None
        return self.layout.units(self.latent_frames)


class Example(NamedTuple):
    """One segment with its caption, before packing: the fields of `Rows`.

    Lengths differ from example to example, so the axes have no letters.
    """

    clean: Float[np.ndarray, "_ p"]
    coarser: Float[np.ndarray, "_ p"]
    position: Float[np.ndarray, "_ 3"]
    frame: Int[np.ndarray, "_"]
    current: Bool[np.ndarray, "_"]
    stage: Int[np.ndarray, "1"]
    text: Shaped[np.ndarray, "..."]
    pooled: Float[np.ndarray, "1 _"]


def make_example(
    cfg: DataConfig,
    tokenize: Tokenize | None,
    levels: LoadLevels,
    number: int,
    record: Record,
) -> Example:
    """Example `number` of a run, made from a record.

    Args:
        tokenize: token ids of a caption; None: the record names stored features.

    Raises:
        ValueError, OSError: the record can't be used.
    """
    text, pooled = _caption(cfg, tokenize, number, record)
    latents = levels(record)
    frames, stage = len(latents[0]), stage_of(cfg, number)
    unit = unit_of(cfg, number, frames)
    clips = segment_clips(frames, stage, unit, cfg.layout)
    grids = tuple(layouts.grid(level, cfg.layout.patch) for level in latents)
    places = _places(grids, frames, stage, unit, cfg.layout)
    if len(places[0]) > cfg.tokens:
        raise ValueError(
            f"a latent of shape {latents[-1].shape} makes a segment of "
            f"{len(places[0])} tokens, but a row has {cfg.tokens}; raise tokens"
        )
    values = layouts.segment_values(latents, clips, cfg.layout.patch)
    return Example(*values, *places, np.array([stage], np.int32), text, pooled)


# ------------------------------------------------------------- what a number decides


def stage_of(cfg: DataConfig, number: int) -> int:
    """The stage that an example trains.

    Every row of a batch goes through all stages, and beside it the next row is one
    example ahead.
    """
    index, row = divmod(number, cfg.batch)
    return cfg.pattern[(index + row) % len(cfg.pattern)]


def unit_of(cfg: DataConfig, number: int, frames: int) -> int | None:
    """The unit of a latent of `frames` that an example trains; None: all at once."""
    if cfg.units is None:
        return None
    available = cfg.layout.units(frames)
    index, row = divmod(number, cfg.batch)
    # The rows take turns, and each row takes all of them, whatever divides them.
    group = index // len(cfg.pattern)
    turn = group * cfg.batch + (row + group) % cfg.batch
    fine, coarser = layouts.balanced_units(turn, cfg.units, available)
    finest = len(cfg.stage_shares) - 1
    return fine if stage_of(cfg, number) == finest else coarser


def drops_caption(cfg: DataConfig, number: int) -> bool:
    """Whether an example is trained without its caption."""
    return bool(np.random.default_rng((cfg.seed, number)).random() < cfg.dropout)


def segment_clips(
    frames: int, stage: int, unit: int | None, cut: Layout
) -> tuple[Clip, ...]:
    """The clips of a segment: a unit with its history, or all frames if None."""
    if unit is None:
        return (layouts.first_clip(stage, frames),)
    at = stage, unit, unit + 1
    return layouts.compact(layouts.clips(*at, cut.frames_per_unit, cut.history))


# ------------------------------------------------------------- what a record contains


def load_levels(
    cfg: DataConfig, load: LoadLatent, cache: ArrayCache, record: Record
) -> list[Float[np.ndarray, "t _ _ c"]]:
    """The pyramid of a record's latent, coarsest level first."""

    def make() -> list[np.ndarray]:
        latent = load(record, cfg.all_sizes)
        latent = latent[: cfg.layout.longest(len(latent))]
        levels = pyramid.levels(latent, len(cfg.stage_shares))
        return [np.asarray(level) for level in levels]

    return cache.get(record.path, make)


def latent_loader(cfg: DataConfig) -> LoadLatent:
    """How latents are loaded: pixels of the file, or stored if a VAE made them.

    Raises:
        ValueError: they are to be encoded, which takes a VAE: see `encoded_latent`.
    """
    latent = cfg.latent
    if cfg.encode:
        raise ValueError(
            "data.encode needs a VAE that makes latents; name its folder as "
            "`autoencoder`, or store latents by pyramid-jax prepare --latents"
        )
    if (latent.channels, latent.spatial, latent.temporal) == (3, 1, 1):
        return partial(pixel_latent, cfg)
    least = latent.frames(latent.longest(cfg.least))
    return partial(stored_latent, latent, cfg.latent_frames, least=least)


def pixel_latent(
    cfg: DataConfig, record: Record, sizes: tuple[HeightWidth, ...]
) -> Float[np.ndarray, "t h w 3"]:
    """The latent of a pixel-space model: the normalised pixels of a record's file."""
    size = nearest_size(sizes, record)
    pixels = read_pixels(record, size, cfg.frames, cfg.fps, least=cfg.least)
    return cfg.latent.normalise(to_model(pixels))


def encoded_latent(
    cfg: DataConfig, encode: RawEncoder, record: Record, sizes: tuple[HeightWidth, ...]
) -> Float[np.ndarray, "t h w c"]:
    """The normalised latent that a VAE makes of a record's file, always the same."""
    size = nearest_size(sizes, record)
    pixels = read_pixels(record, size, cfg.frames, cfg.fps, least=cfg.least)
    pixels = pixels[: cfg.latent.longest(len(pixels))]
    number = zlib.crc32(str(record.path).encode())
    (raw,) = encode(pixels[None], np.array([number], np.uint32))
    return cfg.latent.normalise(raw)


def stored_latent(
    cfg: LatentConfig,
    frames: int,
    record: Record,
    sizes: tuple[HeightWidth, ...],
    least: int | None = None,
) -> Float[np.ndarray, "t h w c"]:
    """The normalised latent that launch.prepare stored for a record.

    Args:
        frames: latent frames of a video; longer ones are cut.
        sizes: heights and widths of pixels, from one of which it was made.
        least: latent frames of the shortest video; None: all have `frames`.

    Raises:
        ValueError: there is none, or one of another size.
    """
    raw = read_record_latent(record)
    least = frames if least is None else least
    frames, least = (frames, least) if record.kind == "video" else (1, 1)
    size = nearest(sizes, raw.shape[1:3])  # the file itself may be gone
    cells = (side // cfg.spatial for side in size)
    expected = (least, *cells, cfg.channels)
    if len(raw) < least or raw.shape[1:] != expected[1:]:
        raise ValueError(
            f"{record.latent} has shape {raw.shape}, expected {expected}; prepare "
            "latents of the size and frames of this run"
        )
    return cfg.normalise(raw[:frames])


@lru_cache(maxsize=4096)
def _places(
    grids: tuple[tuple[int, int], ...],
    frames: int,
    stage: int,
    unit: int | None,
    layout: Layout,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # perf: few segments differ in where their tokens are, small ones take as long.
    clips = segment_clips(frames, stage, unit, layout)
    return layouts.segment_places(grids, clips, layout)


def _caption(
    cfg: DataConfig, tokenize: Tokenize | None, number: int, record: Record
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, or stored features, of an example's caption, and its pooled vector.

    The vector is empty beside ids: the model that reads them makes its own.
    """
    dropped = drops_caption(cfg, number)
    if tokenize is None:
        text, pooled = stored_features(record, dropped)
    else:
        text = np.array(tokenize("" if dropped else record.text), np.int32)
        pooled = np.zeros((1, 0), np.float32)
    if len(text) > cfg.text_tokens:
        raise ValueError(
            f"the caption of {record.path} has {len(text)} tokens, but a row has "
            f"{cfg.text_tokens}; shorten it or raise text_tokens"
        )
    return text, pooled
