# SPDX-License-Identifier: Apache-2.0
"""A small text encoder that is trained together with the DiT."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int

from pyramid_jax.kernels.attention import attention
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.layers import layer_norm
from pyramid_jax.models.linear import dense, fused_qkv
from pyramid_jax.models.rotary import Turns, angles, rotate, turns
from pyramid_jax.shapes import Text
from pyramid_jax.sharding import named


@dataclass(frozen=True)
class TextConfig:
    """The size of a small text encoder.

    Args:
        vocabulary: number of different token ids.
        width: of the features and of the pooled vector.
    """

    vocabulary: int = 384
    width: int = 128
    heads: int = 2
    blocks: int = 1
    dtype: str = "float32"


class TextEncoder(nn.Module):
    """Turns token ids into `Text`; the mean of a segment's features is its vector."""

    cfg: TextConfig

    @nn.compact
    def __call__(
        self, ids: Int[jax.Array, "b m"], segment: Int[jax.Array, "b m"], segments: int
    ) -> Text:
        """
        Args:
            segment: of each token, -1 for padding; tokens of a segment are neighbours.
            segments: how many a row can hold.
        """
        c = self.cfg
        init = named(nn.initializers.normal(0.5), (None, "embed"))
        table = self.param("table", init, (c.vocabulary, c.width), jnp.float32)
        x = jnp.take(table, ids, axis=0)
        rotary = turns(angles(_order(segment)[..., None], (c.width // c.heads,)))
        for i in range(c.blocks):
            x = TextBlock(c, name=f"block_{i}")(x, rotary, segment)
        x = layer_norm(x)
        member = jax.nn.one_hot(segment, segments, dtype=x.dtype)
        total = jnp.einsum("bms,bmd->bsd", member, x)
        count = jnp.maximum(member.sum(axis=1), 1.0)[..., None]
        return Text(x, segment, total / count)


class TextBlock(nn.Module):
    """Attention inside each segment, then an MLP, both added to the stream."""

    cfg: TextConfig

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "b m d"],
        rotary: Turns,
        segment: Int[jax.Array, "b m"],
    ) -> Float[jax.Array, "b m d"]:
        c = self.cfg
        qkv = fused_qkv(c.heads, c.width // c.heads, c.dtype)(layer_norm(x))
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        mask = TokenMask(segment, jnp.zeros_like(segment))
        attended = attention(rotate(q, rotary), rotate(k, rotary), v, mask)
        x = x + dense(c.width, ("heads", None, "embed"), c.dtype, contract=2)(attended)
        hidden = nn.gelu(dense(4 * c.width, ("embed", "mlp"), c.dtype)(layer_norm(x)))
        return x + dense(c.width, ("mlp", "embed"), c.dtype)(hidden)


def _order(segment: Int[jax.Array, "b m"]) -> Float[jax.Array, "b m"]:
    """The place of each token inside its segment, from 0."""
    index = jnp.arange(segment.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate(
        [jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1
    )
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return (index - first).astype(jnp.float32)
