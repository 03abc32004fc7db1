# SPDX-License-Identifier: Apache-2.0
"""Examples of any length fill rows of one length, which take about equally long.

Rows are filled in rounds: an example goes into the first row of the round where it fits
(video tokens, caption tokens, segments), and the first one that fits nowhere begins the
next round. So the more rows a round has, the fewer places stay empty. All rows have as
many products with weights, but not as much attention: the rows of a round come sorted
by it, so that rows that are trained together, each the next one of a stream of its own,
take about equally long. Where a device gets pairs of rows, every second stream goes the
other way, so that what varies most, the rows with the least attention and those with
the most, meet on a device.
"""

import grain
import numpy as np

from pyramid_jax.data.examples import DataConfig
from pyramid_jax.layout import Segment
from pyramid_jax.mask import visible_pairs

PackedRow = dict[str, np.ndarray]


def packed_rows(
    examples: grain.IterDataset, cfg: DataConfig, row: int = 0
) -> grain.IterDataset[PackedRow]:
    """The rows of a stream in numpy, packed from examples as dicts.

    Grain numbers the segments, from 1.

    Args:
        row: number of the stream in the batch.
    """
    lengths = dict.fromkeys(Segment._fields, cfg.tokens) | {"text": cfg.text_tokens}
    lengths |= dict.fromkeys(("stage", "pooled"), cfg.segments)
    rows = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct=lengths,
        padding_struct=dict.fromkeys(lengths) | {"stage": -1},
        num_packing_bins=cfg.open_rows,
        shuffle_bins=False,
    )
    rounds = rows.batch(cfg.open_rows, batch_fn=list)
    by_attention = _ByAttention(cfg.open_rows, cfg.paired and row % 2 == 1)
    return grain.experimental.FlatMapIterDataset(rounds, by_attention)


def packed_pairs(row: PackedRow) -> int:
    """The `visible_pairs` of a packed row."""
    words = row["text_segment_ids"]
    segment = np.concatenate([words, row["frame_segment_ids"]]) - 1
    return visible_pairs(segment, np.concatenate([0 * words, row["frame"]]))


class _ByAttention(grain.experimental.FlatMapTransform):
    """The rows of a round, those with the least attention first, or last."""

    def __init__(self, rows: int, falling: bool):
        self.max_fan_out, self._falling = rows, falling

    def flat_map(self, element: list[PackedRow]) -> list[PackedRow]:
        """The rows in their order."""
        return sorted(element, key=packed_pairs, reverse=self._falling)
