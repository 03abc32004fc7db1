# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of packed rows, beside numbers worked out by hand."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from configs import flux_384p, mmdit_384p, tiny
from pyramid_jax import flops, sharding, train
from pyramid_jax.model import initialise, model_config
from pyramid_jax.shapes import Rows


def kernel(*shape: int) -> dict[str, Any]:
    return {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}


# Patches of 3 values, captions of 5, two blocks, and little of what else there is.
WEIGHTS = {
    "dit": {
        "text_in": kernel(5, 8),
        "video_in": kernel(3, 8),
        "time": {"hidden": kernel(2, 8)},
        "double": {"video": {"qkv": kernel(2, 8, 3, 4, 2)}},
        "head": kernel(8, 3),
    },
    "text": {"mlp": kernel(6, 7), "norm": {"scale": np.zeros(9)}},
}
COST = flops.RowCost(
    text=2 * 5 * 8 + 2 * 6 * 7,
    video=2 * 3 * 8 + 2 * (2 * 8 * 24) + 2 * 8 * 3,
    segment=2 * 2 * 8,
    pair=4 * 3 * 32,  # queries with keys, weights with values, in blocks 32 wide
)


def packed() -> Rows:
    """A row of two segments and a row of one, of 7 places and 3 for words.

    Frames are as in the rows' lists: the first segment has two words and frames of 1
    and 2 tokens, the second one no words and frames of 1 and 1.
    """
    segment = np.array([[0, 0, 0, 1, 1, -1, -1], [0, 0, -1, -1, -1, -1, -1]], np.int32)
    frame = np.array([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]], np.int32)
    words = np.array([[0, 0, -1], [0, -1, -1]], np.int32)
    stage = np.array([[0, 2], [1, -1]], np.int32)
    zeros = np.zeros((2, 7, 3), np.float32)
    pooled = np.zeros((2, 2, 0), np.float32)
    order = (zeros, zeros, zeros, segment, frame, segment >= 0, stage)
    return Rows(*order, words, words, pooled)


def test_a_row_is_counted_by_its_tokens_segments_and_visible_pairs():
    model = model_config(tiny.get_config("smoke").model.to_dict())
    assert flops.row_cost(model, WEIGHTS) == COST
    counts = flops.row_counts(packed())
    np.testing.assert_array_equal(counts, [[2, 1], [5, 2], [2, 1]])
    # 3 words and tokens see each other, 2 see all 5; 1 sees itself, 1 sees both.
    np.testing.assert_array_equal(flops.row_pairs(packed()), [9 + 10 + 1 + 2, 9])
    every = flops.row_pairs(packed(), causal=False)
    np.testing.assert_array_equal(every, [25 + 4, 9])


@pytest.mark.parametrize("module", [mmdit_384p, flux_384p])
def test_a_token_of_the_released_models_passes_24_blocks_of_12_squares(module: Any):
    """Three of them are queries, keys and values, one the output, eight the MLP; the
    last block takes keys and values of the text, its queries beside them."""
    cost, width = counted(module.get_config())
    squares = 24 * 12 * width**2
    assert cost.video == 2 * (squares + 2 * 64 * width)
    assert cost.text == 2 * (squares - 9 * width**2 + 4096 * width)
    assert cost.pair == 4 * 24 * width


def counted(cfg: Any) -> tuple[flops.RowCost, int]:
    """What a row of a config's model takes, and the model's width."""
    model = model_config(cfg.model.to_dict())
    init = partial(initialise, model)
    weights = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    return flops.row_cost(model, weights), model.dit.width


@pytest.mark.parametrize("passes", [3, 2])
def test_places_that_are_empty_are_computed_and_not_needed(passes: int):
    cfg = tiny.get_config("smoke")
    (cost, _), arithmetic = counted(cfg), train.arithmetic
    work = arithmetic(model_config(cfg.model.to_dict()), passes).count(packed())
    attention = 3 * cost.pair * np.array([22, 9])
    first, second, whole = (
        cost.products(*n) for n in [(2, 5, 2), (1, 2, 1), (3, 7, 2)]
    )
    expected = passes * np.array([first, second]) + attention
    np.testing.assert_array_equal(work.needed, expected)
    np.testing.assert_array_equal(work.computed, passes * whole + attention)


def test_the_peak_of_a_device_is_that_of_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "peak", lambda kind: 1e15 if kind == "cpu" else None)
    cfg = tiny.get_config("smoke")
    for dtype, peak in (("bfloat16", 1e15), ("float32", None)):
        cfg.model.dit.dtype = dtype
        assert train.arithmetic(model_config(cfg.model.to_dict())).peak == peak
