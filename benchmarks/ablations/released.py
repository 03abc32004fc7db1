# SPDX-License-Identifier: Apache-2.0
"""What histories cost at the released sizes: tokens and FLOP, without running anything.

An Euler step of the last unit at the finest stage, and all steps of a video, for one
row of the SD3 variant; guidance doubles the FLOP.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from pyramid_jax import flops, layout, sharding
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import MMDIT, ModelConfig, initialise

TEXT = 128  # tokens of a prompt
FIRST, LATER = 20, 10  # Euler steps of each stage
VIDEOS: Mapping[str, tuple[tuple[int, int], int]] = MappingProxyType(
    {"384p, 5 s": ((48, 80), 16), "768p, 10 s": ((96, 160), 31)}
)


class HistoryCost(NamedTuple):
    """Of the longest Euler step, and of all of a video."""

    tokens: int
    step: int
    video: int


def history_cost(video: str, history: str) -> HistoryCost:
    """What a video of `VIDEOS` costs with one of `layout.HISTORIES`."""
    cells, frames = VIDEOS[video]
    model = _model(history)
    stages = range(len(model.stages))
    if history == layout.NONE:
        sizes = [frames * _finest(cells) // 4 ** (len(stages) - 1 - k) for k in stages]
        steps = [_sequence_step(size) for size in sizes]
        return HistoryCost(sizes[-1], steps[-1], FIRST * sum(steps))
    total = 0
    for unit in range(frames):
        for k in stages:
            of_frames = flops.frames(model, cells, k, unit)
            step = flops.step(_weights(), model, TEXT, of_frames)
            total += step * (FIRST if unit == 0 else LATER)
    return HistoryCost(sum(of_frames), step, total)


def _sequence_step(tokens: int) -> int:
    """FLOP of a step that answers all tokens, which see each other and the text."""
    row = flops.RowLengths(TEXT, tokens, 0, tokens)
    products = flops.products(_weights(), row).items()
    blocks = MMDIT.double_blocks + MMDIT.single_blocks
    pairs = (TEXT + tokens) ** 2
    dense = sum(product.flops * count for product, count in products)
    return dense + 4 * blocks * pairs * MMDIT.width


def _finest(cells: tuple[int, int]) -> int:
    return cells[0] * cells[1] // Layout().patch ** 2


def _model(history: str) -> ModelConfig:
    cut = replace(Layout(), position_table=MMDIT.position_table, history=history)
    return ModelConfig(MMDIT, cut, LatentConfig())


@cache
def _weights() -> Any:
    init = partial(initialise, _model(layout.PYRAMID))
    return sharding.unbox(jax.eval_shape(init, jax.random.key(0)))["dit"]
