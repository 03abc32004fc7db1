# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom, as two integers per token instead of a matrix.

*A token sees the keys of its own segment that are not later than itself; segment -1 is
padding, which sees nothing and is seen by nothing.* Text has frame 0, so it sees itself
and the first frame, and every frame sees the text. Without causality all tokens have
frame 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Int

from pyramid_jax.shapes import Array


class TokenMask(NamedTuple):
    """The segment (-1 for padding) and the frame order of every token of a row."""

    segment: Int[Array, "b l"]
    frame: Int[Array, "b l"]

    def last(self, count: int) -> "TokenMask":
        """Only the last tokens."""
        return TokenMask(self.segment[:, -count:], self.frame[:, -count:])


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
