# SPDX-License-Identifier: Apache-2.0
"""A model and its inputs for both implementations, and the arithmetic they need."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from pyramid_jax import flops, layout, mask, pyramid, sharding
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import VARIANTS, ModelConfig, initialise
from pyramid_jax.shapes import Rows, Text

# Stages of the segments of a row, as the original's training script mixes them.
COLUMNS = (0, 1, 1, 2)
NEGATIVE, PROMPT = 0, 1  # rows of the text that guides sampling


class Features(NamedTuple):
    """Encoded captions: token features, and one pooled vector for each."""

    tokens: Float[np.ndarray, "s m text"]
    pooled: Float[np.ndarray, "s pooled"]


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and of its inputs; everything else is as released.

    Args:
        depth: blocks of the transformer; in miniFLUX a third of them are double blocks.
        cells: height and width of a latent.
        frames: latent frames of a training video.
        caption: text tokens, all valid.
        sampled: latent frames of a sampled video.
        steps: Euler steps of each stage.
    """

    variant: str = "mmdit"
    depth: int = 8
    width: int = 512
    heads: int = 8
    cells: tuple[int, int] = (24, 40)
    frames: int = 8
    caption: int = 128
    sampled: int = 4
    steps: int = 2

    @property
    def double_blocks(self) -> int:
        """Blocks with weights of their own for text and video."""
        return self.depth if self.variant == "mmdit" else max(1, self.depth // 3)

    @cached_property
    def model(self) -> ModelConfig:
        """The model in float32."""
        dim = self.width // self.heads
        three = (dim // 4, dim * 3 // 8, dim * 3 // 8)
        dit = replace(
            VARIANTS[self.variant],
            width=self.width,
            heads=self.heads,
            double_blocks=self.double_blocks,
            single_blocks=self.depth - self.double_blocks,
            rope_axes=(dim,) if self.variant == "mmdit" else three,
            dtype="float32",
            remat="products",
        )
        return ModelConfig(
            dit, Layout(position_table=dit.position_table), LatentConfig()
        )

    @property
    def units(self) -> tuple[int, int]:
        """The training unit of the finest stage and of the others, counted from 0."""
        return layout.balanced_units(self.frames // 2, self.frames, self.frames)

    @cached_property
    def videos(self) -> Float[np.ndarray, "s t h w c"]:
        """A latent video for every column of the training row."""
        shape = (len(COLUMNS), self.frames, *self.cells, self.model.latent.channels)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    def captions(self, count: int) -> Features:
        """Features of `count` captions."""
        rng, dit = np.random.default_rng(1), self.model.dit
        tokens = rng.standard_normal((count, self.caption, dit.text_width), np.float32)
        return Features(
            tokens, rng.standard_normal((count, dit.pooled_width), np.float32)
        )

    @cached_property
    def rows(self) -> Rows:
        """The training row: a segment of every column, its captions first."""
        fine, coarser = self.units
        segments = []
        for stage, video in zip(COLUMNS, self.videos, strict=True):
            unit = fine if stage == max(COLUMNS) else coarser
            clips = layout.compact(layout.clips(stage, unit, unit + 1))
            levels = [np.asarray(x) for x in pyramid.levels(video, max(COLUMNS) + 1)]
            segments.append(layout.segment(levels, clips, self.model.layout))
        captions = self.captions(len(COLUMNS))
        order = np.arange(len(COLUMNS), dtype=np.int32)
        lengths = [len(segment.clean) for segment in segments]
        values = {
            name: np.concatenate([getattr(segment, name) for segment in segments])[None]
            for name in layout.Segment._fields
        }
        return Rows(
            **values,
            segment=np.repeat(order, lengths)[None],
            stage=np.array([COLUMNS], np.int32),
            text=captions.tokens.reshape(1, -1, captions.tokens.shape[-1]),
            text_segment=np.repeat(order, self.caption)[None],
            pooled=captions.pooled[None],
        )

    @property
    def prompts(self) -> Text:
        """The text of one sampled video: a negative prompt's row, then the prompt's."""
        captions = self.captions(2)
        segment = np.zeros((2, self.caption), np.int32)
        return Text(captions.tokens, segment, captions.pooled[:, None])

    # ------------------------------------------------------------------- arithmetic

    @cached_property
    def weights(self) -> Any:
        """Shapes of the transformer's weights."""
        fresh = jax.eval_shape(
            lambda key: initialise(self.model, key), jax.random.key(0)
        )
        return sharding.unbox(fresh)["dit"]

    @property
    def parameters(self) -> int:
        """How many numbers the transformer learns."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.weights))

    @property
    def tokens(self) -> tuple[int, int]:
        """Text and video tokens of the training row."""
        return self.rows.text_segment.shape[1], self.rows.segment.shape[1]

    @property
    def mask(self) -> mask.TokenMask:
        """Who sees whom in the training row."""
        rows = self.rows
        return mask.joint(rows.text_segment, rows.segment, rows.frame)

    @property
    def pairs(self) -> int:
        """Query-key pairs that the training row's mask lets through."""
        return int(mask.dense_mask(self.mask).sum())

    def products(self) -> Counter[flops.Product]:
        """How often each matrix product with weights occurs in a forward pass."""
        row = flops.RowLengths(*self.tokens, segments=len(COLUMNS))
        return flops.products(self.weights, row)
