# SPDX-License-Identifier: Apache-2.0
"""Keys and values that a network keeps of rows that it has read, for rows that go on.

Text sees the first frame, and a frame sees no later one. So what a network makes of
text and of the first frames of a row is the same for all rows that begin with them and
are modulated alike, however they end. A cache has slots, which are taken in turn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from pyramid_jax.kernels.visits import Mask
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.dit_blocks import DiTConfig, KeyValues
from pyramid_jax.sharding import constrain, shares

# Of keys and values; inside of attention, devices divide the heads.
AXES = ("layers", "batch", None, "attended", None)


class Cache(NamedTuple):
    """Keys and values in the slots of a row, of which the first `taken` are in use.

    Attributes:
        blocks: by the names of the blocks' weights, `layers b slots heads dim`.
        mask: of the slots; empty ones are padding.
    """

    blocks: dict[str, KeyValues]
    mask: Mask
    taken: Int[jax.Array, ""]

    def before(self, mask: TokenMask) -> Mask:
        """The mask of a row that goes on from the slots with such tokens."""
        pairs = zip(self.mask, mask, strict=True)
        return TokenMask(*(jnp.concatenate(pair, axis=1) for pair in pairs))

    def lasting(self) -> "Cache":
        """Without what `append` has written beyond the slots in use."""
        segment, order = self.mask
        used = jnp.arange(segment.shape[1])[None] < self.taken
        return self._replace(mask=TokenMask(jnp.where(used, segment, -1), order))

    def append(
        self, blocks: dict[str, KeyValues], mask: TokenMask, lasting: int
    ) -> "Cache":
        """With more tokens in the next slots, the first of which stay in use.

        If there are not enough, they take the last ones: what comes after the last unit
        is never read.
        """

        def write(slots: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, self.taken, axis)

        def write_block(slots: jax.Array, new: jax.Array) -> jax.Array:
            return constrain(write(slots, constrain(new, AXES), 2), AXES)

        masks = zip(self.mask, mask, strict=True)
        return Cache(
            jax.tree.map(write_block, self.blocks, blocks),
            TokenMask(*(write(*pair, 1) for pair in masks)),
            self.taken + lasting,
        )


def empty_cache(cfg: DiTConfig, rows: int, slots: int) -> Cache:
    """A cache for so many tokens of every row, none of which is there.

    Raises:
        ValueError: frames see later ones, so that nothing stays the same.
    """
    if not cfg.causal:
        raise ValueError(
            "without causality every token depends on every frame, so that no keys and "
            "values can be reused; sample without reuse"
        )
    heads = cfg.heads + -cfg.heads % shares("attended")  # see `exchange.by_heads`

    def zeros(layers: int) -> jax.Array:
        shape = layers, rows, slots, heads, cfg.head_dim
        return constrain(jnp.zeros(shape, cfg.dtype), AXES)

    order = jnp.zeros((rows, slots), jnp.int32)
    return Cache(
        {name: KeyValues(zeros(n), zeros(n)) for name, n in cfg.depths.items() if n},
        TokenMask(order - 1, order),
        jnp.int32(0),
    )
