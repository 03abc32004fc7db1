# SPDX-License-Identifier: Apache-2.0
"""The rows of tokens that every attention backend is tested, compiled and timed on.

A case is a mask. At scale 1 it has the sizes of the released models: 384p has 12 x 20,
24 x 40 and 48 x 80 latent cells per stage, 768p twice as many per side, two by two to a
token. A smaller scale divides the sides, so that an interpreter can run it.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyramid_jax.mask import TokenMask

STAGES = 3
GRIDS = {"384p": (24, 40), "768p": (48, 80)}  # tokens of the finest stage
TEXT = 128


class CaseSegment(NamedTuple):
    """A segment before packing: how many text tokens, the frame of each video token."""

    text: int
    frame: np.ndarray


def case_names() -> list[str]:
    """The names of all cases."""
    sampling = [
        f"{size} stage {stage} unit {unit}"
        for size in GRIDS
        for stage in range(STAGES)
        for unit in (0, 1, 8, 15)
    ]
    return [*sampling, "768p stage 2 unit 30", "packed", "packed tightly", "scattered"]


def case(name: str, scale: float = 1.0) -> TokenMask:
    """The mask of one row, `b = 1`, in numpy.

    Args:
        name: one of `case_names`, or one like them. "384p stage 2 unit 8" is a row of
            sampling, with text padded on the left; unit 0 is an image. "packed" is a
            training row, "packed 4096" one of about that many tokens, "packed tightly"
            one of many short segments; "scattered" has tokens in no order, padding
            everywhere, and tokens that see only themselves.
        scale: of the sides of frames and of the number of text tokens.

    Raises:
        ValueError: there is no case of that name.
    """
    if name == "packed":
        units = ((2, 15), (1, 0), (0, 0), (2, 0), (1, 8))
        return _packed([_segment("384p", *each, scale) for each in units], scale)
    if name == "packed tightly":
        return _packed([_segment("384p", 0, 0, scale) for _ in range(8)], scale)
    if name == "scattered":
        return _scattered(max(8, int(4096 * scale)))
    if match := re.fullmatch(r"packed (\d+)", name):
        return _packed(_budget(int(match[1]) * scale**2, scale), scale)
    match = re.fullmatch(rf"({'|'.join(GRIDS)}) stage ([0-2]) unit (\d+)", name)
    if match is None:
        raise ValueError(f"no case {name!r}; the cases are {case_names()}")
    size, stage, unit = match.groups()
    return _sampling(_segment(size, int(stage), int(unit), scale), scale)


def batch(names: Sequence[str], length: int, scale: float) -> TokenMask:
    """The cases as rows of one batch, cut or padded to `length` tokens."""
    rows = [case(name, scale) for name in names]
    short = [TokenMask(*(x[:, :length] for x in row)) for row in rows]

    def even(x: np.ndarray, value: int) -> np.ndarray:
        widths = (0, 0), (0, length - x.shape[1])
        return np.pad(x, widths, constant_values=value)

    return TokenMask(
        np.concatenate([even(row.segment, -1) for row in short]),
        np.concatenate([even(row.frame, 0) for row in short]),
    )


def _segment(size: str, stage: int, unit: int, scale: float) -> CaseSegment:
    """A unit at a stage after its history: older frames at stage 0, the last `stage`
    frames one stage finer each."""
    cells = []
    for s in range(stage + 1):
        sides = (side * scale / 2 ** (STAGES - 1 - s) for side in GRIDS[size])
        cells.append(math.prod(max(1, round(side)) for side in sides))
    stages = [max(0, stage + 1 - (unit - f)) for f in range(unit)]
    counts = [cells[s] for s in stages] + [cells[stage]]
    return CaseSegment(_text(scale), np.repeat(np.arange(unit + 1), counts))


def _budget(tokens: float, scale: float) -> list[CaseSegment]:
    """Units of a training row in turn, until the next one is too long."""
    turns = itertools.cycle(((2, 15), (1, 0), (0, 8), (2, 0), (1, 8), (0, 0)))
    segments: list[CaseSegment] = []
    for stage, unit in turns:
        segment = _segment("384p", stage, unit, scale)
        tokens -= segment.text + len(segment.frame)
        if segments and tokens < 0:
            break
        segments.append(segment)
    return segments


def _text(scale: float) -> int:
    return max(2, round(TEXT * scale))


def _sampling(segment: CaseSegment, scale: float) -> TokenMask:
    """One segment whose text fills two thirds of its places, on the right."""
    valid = np.arange(segment.text) >= segment.text // 3
    text = np.where(valid, 0, -1)
    return _joined(text, np.zeros_like(segment.frame), segment.frame)


def _packed(segments: Sequence[CaseSegment], scale: float) -> TokenMask:
    """A training row: all texts without padding, all videos, padding at the end."""
    numbers = range(len(segments))
    text = np.repeat(numbers, [segment.text for segment in segments])
    video = np.repeat(numbers, [len(segment.frame) for segment in segments])
    frame = np.concatenate([segment.frame for segment in segments])
    padding = 0, max(1, len(frame) // 16)
    video = np.pad(video, padding, constant_values=-1)
    return _joined(text, video, np.pad(frame, padding))


def _scattered(length: int) -> TokenMask:
    draw = np.random.default_rng(0)
    segment = draw.integers(-1, 3, length)
    alone = slice(None, None, max(2, length // 8))
    segment[alone] = 100 + np.arange(len(segment[alone]))
    return TokenMask(
        segment[None].astype(np.int32),
        draw.integers(0, 5, (1, length)).astype(np.int32),
    )


def _joined(text: np.ndarray, segment: np.ndarray, frame: np.ndarray) -> TokenMask:
    order = np.concatenate([np.zeros_like(text), frame])
    both = np.concatenate([text, segment])
    return TokenMask(both[None].astype(np.int32), order[None].astype(np.int32))
