# SPDX-License-Identifier: Apache-2.0
"""Rows of packed examples: what the mask lets through, full rows, even rounds."""

from dataclasses import replace

import grain
import numpy as np
import pytest

from pyramid_jax.data.examples import DataConfig
from pyramid_jax.data.packing import packed_rows
from pyramid_jax.layout import Segment
from pyramid_jax.mask import dense_mask, joint, visible_pairs

CFG = DataConfig("", 8, 8, 1, 8.0, 2, 100, 100, 8, open_rows=4)


def example(tokens: int, words: int = 1) -> dict[str, np.ndarray]:
    frame = np.repeat([0, 1], [tokens // 2, tokens - tokens // 2]).astype(np.int32)
    one = np.zeros(1, np.int8)
    fields = dict.fromkeys(Segment._fields, np.zeros(tokens, np.int8))
    text = np.zeros(words, np.int8)
    return fields | {"frame": frame, "text": text, "stage": one, "pooled": one}


def rows(
    lengths: list[int], cfg: DataConfig = CFG, row: int = 0
) -> list[dict[str, np.ndarray]]:
    examples = grain.MapDataset.source([example(n) for n in lengths])
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return list(packed_rows(examples.to_iter_dataset(read), cfg, row))


def test_visible_pairs_are_those_of_the_mask():
    random = np.random.default_rng(0)
    segment = np.sort(random.integers(-1, 3, (1, 40))).astype(np.int32)
    frame = random.integers(0, 4, (1, 40)).astype(np.int32)
    words = np.sort(random.integers(-1, 3, (1, 9))).astype(np.int32)
    mask = joint(words, segment, frame)
    expected = int(dense_mask(mask).sum())
    assert visible_pairs(*(np.asarray(x[0]) for x in mask)) == expected > 0
    assert visible_pairs(np.full(3, -1), np.zeros(3, int)) == 0


def test_a_round_begins_with_the_least_attention_and_keeps_every_token():
    lengths = [90, 30, 30, 30, 60, 20, 99, 99, 80, 70, 60, 50]
    made = rows(lengths)
    pairs = [
        visible_pairs(row["frame_segment_ids"] - 1, row["frame"]) for row in made[:4]
    ]
    assert pairs == sorted(pairs) and len(set(pairs)) > 1
    assert sum((row["frame_segment_ids"] > 0).sum() for row in made) == sum(lengths)
    assert max(row["stage_segment_ids"].max() for row in made) == 3


def test_every_second_row_of_pairs_goes_the_other_way():
    lengths = [90, 30, 30, 30, 60, 20, 99, 99, 80, 70, 60, 50]
    paired = replace(CFG, paired=True)
    even, odd = rows(lengths, paired, row=2), rows(lengths, paired, row=3)
    assert len(even) == len(odd) > 4
    for one, other in zip(even[:4], reversed(odd[:4]), strict=True):
        np.testing.assert_array_equal(one["frame"], other["frame"])
    again = rows(lengths, row=3)
    np.testing.assert_array_equal(again[0]["frame"], even[0]["frame"])


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_iterator_is_set_back_inside_a_round(at: int):
    lengths = [90, 30, 30, 30, 60, 20, 99, 99, 80, 70, 60, 50]
    examples = grain.MapDataset.source([example(n) for n in lengths])
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    first = iter(packed_rows(examples.to_iter_dataset(read), CFG))
    for _ in range(at):
        next(first)
    second = iter(packed_rows(examples.to_iter_dataset(read), CFG))
    second.set_state(first.get_state())
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
