# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a step of the transformer is, and what chips could do of it.

Counted are matrix products, an addition and a multiplication as two operations: of
tokens with weights, and in attention of the query-key pairs that the mask lets through.
Not counted are norms, activations and the softmax, and what a program computes beyond
that: hidden pairs, empty slots of the history, queries of the history in the last
block. Rates that are derived from these counts
therefore fall when a program does useless work.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from pyramid_jax import layout
from pyramid_jax.layout import Clip
from pyramid_jax.mask import visible_pairs
from pyramid_jax.model import ModelConfig
from pyramid_jax.models.dit import STACKED
from pyramid_jax.shapes import Rows

# Dense bfloat16 FLOP/s that the makers state; the first name that a device's begins
# with counts. The boards with PCIe have lower clocks.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e
}
PER_SEGMENT = {"modulation", "head_modulation", "time", "pooled"}
OF_TEXT = {"text", "text_in"}
LAST = {"last_double", "last_single"}  # of the history they make keys and values only


class Product(NamedTuple):
    """A matrix product of a forward pass: (tokens, inputs) with (inputs, outputs)."""

    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.inputs * self.outputs


class RowLengths(NamedTuple):
    """How many text tokens, video tokens and segments a row has.

    Of the video tokens `current` are answered, the last ones; None: all. An Euler step
    has no segments of its own: what modulates it was made before.
    """

    text: int
    video: int
    segments: int = 1
    current: int | None = None

    @property
    def answered(self) -> int:
        return self.video if self.current is None else self.current


def products(weights: Any, row: RowLengths) -> Counter[Product]:
    """How often each matrix product with weights occurs in a forward pass of one row.

    Args:
        weights: of a `DiT`, or their shapes.
    """
    products: Counter[Product] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        names = [entry.key for entry in path]
        if names[-1] != "kernel":
            continue
        stacked = names[0] in STACKED
        count, shape = (leaf.shape[0] if stacked else 1), leaf.shape[stacked:]
        inputs = math.prod(shape[:2]) if len(shape) == 3 else shape[0]
        product = Product(_seen(names, row), inputs, math.prod(shape) // inputs)
        products[product] += count
    return products


class RowCost(NamedTuple):
    """FLOP of a forward pass: of each text token, video token and segment, and `pair`
    of each query-key pair that the mask lets through."""

    text: int
    video: int
    segment: int
    pair: int

    def products(self, text: Any, video: Any, segments: Any) -> Any:
        """Products of so many tokens and segments with weights."""
        return text * self.text + video * self.video + segments * self.segment


def row_cost(model: ModelConfig, weights: Any) -> RowCost:
    """What a packed row of training takes, in which all video tokens are answered.

    Args:
        weights: of the model, or their shapes; those of a text encoder count, too.
    """
    each = RowLengths(1, 0, 0), RowLengths(0, 1, 0), RowLengths(0, 0, 1)
    text, video, segment = (_dense(weights["dit"], row) for row in each)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.get("text", {})):
        if path[-1].key == "kernel":
            text += 2 * leaf.size
    return RowCost(text, video, segment, 4 * _depth(model) * model.dit.width)


def row_counts(rows: Rows) -> Int[np.ndarray, "3 b"]:
    """Text tokens, video tokens and segments of every packed row."""
    parts = rows.text_segment, rows.segment, rows.stage
    return np.stack([(np.asarray(part) >= 0).sum(axis=1) for part in parts])


def row_pairs(rows: Rows, causal: bool = True) -> Int[np.ndarray, "b"]:
    """Query-key pairs that the mask lets through in every packed row."""
    words, video = np.asarray(rows.text_segment), np.asarray(rows.segment)
    segment = np.concatenate([words, video], axis=1)
    frame = np.concatenate([np.zeros_like(words), rows.frame], axis=1)
    frame = frame if causal else np.zeros_like(frame)
    return np.array([visible_pairs(*row) for row in zip(segment, frame, strict=True)])


def segment_pairs(text: int, frames: Sequence[int]) -> int:
    """Query-key pairs that the causal mask of one segment lets through.

    Args:
        text: text tokens, which count as frame 0.
        frames: tokens of frame 0, 1, ...
    """
    sizes = [text + frames[0], *frames[1:]]
    seen = accumulate(sizes)
    return sum(size * before for size, before in zip(sizes, seen, strict=True))


def current_pairs(text: int, frames: Sequence[int], count: int) -> int:
    """Those of `segment_pairs` whose queries are tokens of the last `count` frames."""
    seen = accumulate([text + frames[0], *frames[1:]])
    each = [size * before for size, before in zip(frames, seen, strict=True)]
    return sum(each[-count:])


def frames(
    model: ModelConfig,
    cells: tuple[int, int],
    stage: int,
    unit: int,
    slots: int | None = None,
) -> list[int]:
    """Tokens of each frame, earliest first, that the network reads in a step.

    Args:
        cells: height and width of the latents at the finest stage.
        slots: units that there is room for; empty slots count. None: no empty ones.
    """
    per_unit = model.layout.frames_per_unit if unit else 1
    at = stage, unit, slots or unit + 1
    clips = layout.clips(*at, per_unit, model.layout.history)
    return of_clips(model, cells, layout.compact(clips) if slots is None else clips)


def of_clips(
    model: ModelConfig, cells: tuple[int, int], clips: Sequence[Clip]
) -> list[int]:
    """Tokens of each frame of some clips."""
    finest = math.prod(cells) // model.layout.patch**2
    last = len(model.stages) - 1
    return [finest // 4 ** (last - clip.stage) for clip in clips for _ in clip.frame]


def step(
    weights: Any,
    model: ModelConfig,
    text: int,
    of_frames: Sequence[int],
    empty: int = 0,
    known: int = 0,
) -> int:
    """FLOP of an Euler step on one row: one segment with these tokens.

    Args:
        known: tokens before them whose keys and values are reused; without text then.
        empty: tokens in empty slots of the history, of which the network makes products
            with weights, while attention passes over them.
    """
    count = model.layout.frames_per_unit if len(of_frames) > 1 else 1
    row = RowLengths(text, sum(of_frames) + empty, 0, sum(of_frames[-count:]))
    every = segment_pairs(text, of_frames) + known * sum(of_frames)
    last = current_pairs(text, of_frames, count) + known * sum(of_frames[-count:])
    attention = 4 * ((_depth(model) - 1) * every + last) * model.dit.width
    return _dense(weights, row) + attention


def peak(device_kind: str) -> float | None:
    """The FLOP/s of `PEAKS` for a device as JAX names it; None: unknown, or a slice."""
    if "MIG" in device_kind:
        return None
    rates = (rate for name, rate in PEAKS.items() if device_kind.startswith(name))
    return next(rates, None)


def _dense(weights: Any, row: RowLengths) -> int:
    return sum(p.flops * n for p, n in products(weights, row).items())


def _depth(model: ModelConfig) -> int:
    return model.dit.double_blocks + model.dit.single_blocks


def _seen(names: list[str], row: RowLengths) -> int:
    """How many tokens of a row pass a layer; conditioning is per segment."""
    if PER_SEGMENT & set(names):
        return row.segments
    if names[0] == "head" or (names[0] in LAST and "qkv" not in names):
        return row.answered
    if names[0].endswith("single"):
        return row.text + row.video
    return row.text if OF_TEXT & set(names) else row.video
