# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom, as two integers per token instead of a matrix.

*A token sees the keys of its own segment that are not later than itself; segment -1 is
padding, which sees nothing and is seen by nothing.* Text has frame 0, so it sees itself
and the first frame, and every frame sees the text. Without causality all tokens have
frame 0.

So what a token sees is one interval in the order of (segment, frame), from the first
rank of its segment to its own; and so are the tokens that see it, from its rank to the
last of its segment. Kernels compare ranks instead of two pairs of integers, whatever
the order of the tokens in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from pyramid_jax.shapes import Array

FRAMES = 1 << 16  # ranks of a segment: more than any row has frames


class TokenMask(NamedTuple):
    """The segment (-1 for padding) and the frame order of every token of a row."""

    segment: Int[Array, "b l"]
    frame: Int[Array, "b l"]

    def last(self, count: int) -> "TokenMask":
        """Only the last tokens."""
        return TokenMask(self.segment[:, -count:], self.frame[:, -count:])


class Ranks(NamedTuple):
    """What a kernel needs to know of the tokens of a row.

    A query sees the keys whose `own` is in [`first`, `own`]; a key is seen by the
    queries whose `own` is in [`own`, `last`]. Both intervals of padding are empty.
    """

    own: Int[Array, "b _"]
    first: Int[Array, "b _"]
    last: Int[Array, "b _"]


def ranks(mask: TokenMask) -> Ranks:
    """The place of every token in the order of (segment, frame), and its intervals.

    Frames are below FRAMES, segments below 2^31 / FRAMES.
    """
    there, start = mask.segment >= 0, mask.segment * FRAMES
    own = jnp.where(there, start + mask.frame, -1)
    return Ranks(
        own,
        jnp.where(there, start, 0),
        jnp.where(there, start + (FRAMES - 1), -2),
    )


def joint(
    text_segment: Int[Array, "b m"],
    segment: Int[Array, "b n"],
    frame: Int[Array, "b n"],
    causal: bool = True,
) -> TokenMask:
    """The mask of a row [text, video]; text counts as frame 0.

    Source: the reference's attention mask without flash attention, frame by frame.
    """
    order = jnp.concatenate([jnp.zeros_like(text_segment), frame], axis=1)
    return TokenMask(
        jnp.concatenate([text_segment, segment], axis=1),
        order if causal else jnp.zeros_like(order),
    )


def dense_mask(mask: TokenMask) -> Bool[Array, "b l l"]:
    """The definition: `[b, query, key]` is true where the query sees the key."""
    return visible([x[:, :, None] for x in mask], [x[:, None] for x in mask])


def visible(query: Sequence[Array], key: Sequence[Array]) -> Bool[Array, "*sides"]:
    """Who sees whom, from segment and frame of both; their shapes are broadcast."""
    (segment, frame), (key_segment, key_frame) = query, key
    same = (segment == key_segment) & (segment >= 0)
    return same & (key_frame <= frame)


def visible_pairs(segment: Int[np.ndarray, "l"], frame: Int[np.ndarray, "l"]) -> int:
    """How many pairs of a row's tokens the mask lets through, see `joint`.

    Args:
        segment: of words and video tokens; below 0: padding.
        frame: words have 0.
    """
    valid, span = segment >= 0, int(frame.max(initial=0)) + 1
    places = segment[valid].astype(np.int64) * span + frame[valid]
    segments = int(segment.max(initial=-1)) + 1
    tokens = np.bincount(places, minlength=segments * span).reshape(segments, span)
    return int((tokens * np.cumsum(tokens, axis=1)).sum())
