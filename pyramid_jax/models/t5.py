# SPDX-License-Identifier: Apache-2.0
"""The encoder of T5 v1.1, whose text features the released models read.

The only positions it knows are distances between tokens, so the same words have the
same features wherever they stand in a row.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int

from pyramid_jax import mask
from pyramid_jax.kernels.attention_blocks import FLOOR
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.layers import RMSNorm, scan, stacked
from pyramid_jax.models.linear import dense, fused_qkv
from pyramid_jax.sharding import named


@dataclass(frozen=True)
class T5Config:
    """The defaults are T5 v1.1 XXL, 4.8 B parameters.

    Args:
        buckets: number of classes of distances between tokens, half per direction.
        farthest: tokens; all larger distances are one class.
        dtype: of matrix products; the stream between blocks is float32, because its
            values reach thousands.
    """

    vocabulary: int = 32128
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    blocks: int = 24
    buckets: int = 32
    farthest: int = 128
    eps: float = 1e-6
    dtype: str = "float32"


class T5Encoder(nn.Module):
    """Turns token ids into one feature vector per token.

    Source: `T5EncoderModel` of transformers, as the original calls it.
    """

    cfg: T5Config

    def setup(self):
        c = self.cfg
        words, distances = (c.vocabulary, c.width), (c.buckets, c.heads)
        normal = nn.initializers.normal(1.0)
        self.words = self.param("words", named(normal, (None, "embed")), words)
        self.distances = self.param(
            "distances", named(normal, (None, "heads")), distances
        )
        inputs = (
            jnp.zeros((1, 1, c.width), jnp.float32),
            jnp.zeros((1, c.heads, 1, 1), jnp.float32),
        )
        block = T5Block(c, parent=None)
        self.blocks = self.param(
            "blocks", lambda key: stacked(key, block, c.blocks, *inputs)
        )
        self.norm = RMSNorm(c.eps)

    def __call__(
        self, ids: Int[jax.Array, "b m"], segment: Int[jax.Array, "b m"]
    ) -> Float[jax.Array, "b m d"]:
        """
        Args:
            segment: of each token, -1 for padding, whose features mean nothing; tokens
                see those of their own segment.
        """
        block, bias = T5Block(self.cfg, parent=None), self.bias(segment)

        def run(weights: Any, _: None, x: jax.Array) -> Any:
            return block.apply({"params": weights}, x, bias)

        (x,) = scan(run, self.blocks, (self.embed(ids),))
        return self.norm(x)

    def embed(self, ids: Int[jax.Array, "b m"]) -> Float[jax.Array, "b m d"]:
        """The stream before the first block."""
        return jnp.take(self.words, ids, axis=0).astype(jnp.float32)

    def bias(self, segment: Int[jax.Array, "b m"]) -> Float[jax.Array, "b heads m m"]:
        """What all blocks add to their logits: distances, and who sees whom."""
        visible = mask.dense_mask(TokenMask(segment, jnp.zeros_like(segment)))[:, None]
        bias = distance_bias(self.distances, segment.shape[1], self.cfg.farthest)
        return jnp.where(visible, bias[None], FLOOR)


class T5Block(nn.Module):
    """Attention with a bias per head, then a gated MLP, both added to the stream."""

    cfg: T5Config

    def setup(self):
        c = self.cfg
        inner, outer = ("embed", "mlp"), ("heads", None, "embed")
        self.attention_norm, self.mlp_norm = RMSNorm(c.eps), RMSNorm(c.eps)
        self.qkv = fused_qkv(c.heads, c.head_dim, c.dtype, bias=False)
        self.out = dense(c.width, outer, c.dtype, contract=2, bias=False)
        self.gate = dense(c.mlp_width, inner, c.dtype, bias=False)
        self.mlp_in = dense(c.mlp_width, inner, c.dtype, bias=False)
        self.mlp_out = dense(c.width, ("mlp", "embed"), c.dtype, bias=False)

    def __call__(
        self, x: Float[jax.Array, "b m d"], bias: Float[jax.Array, "b heads m m"]
    ) -> Float[jax.Array, "b m d"]:
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        x = x + self.out(biased_attention(q, k, v, bias)).astype(jnp.float32)
        y = self.mlp_norm(x)
        hidden = nn.gelu(self.gate(y), approximate=True) * self.mlp_in(y)
        return x + self.mlp_out(hidden).astype(jnp.float32)


def biased_attention(
    q: Float[jax.Array, "b m heads dim"],
    k: Float[jax.Array, "b m heads dim"],
    v: Float[jax.Array, "b m heads dim"],
    bias: Float[jax.Array, "b heads m m"],
) -> Float[jax.Array, "b m heads dim"]:
    """softmax(q kᵀ + bias) v, the softmax in float32; without the usual scale."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def distance_bias(
    distances: Float[jax.Array, "buckets heads"], m: int, farthest: int
) -> Float[jax.Array, "heads m m"]:
    """What each head adds to the logits of `[query, key]`, by their distance alone."""
    offset = np.arange(m)[None, :] - np.arange(m)[:, None]
    index = buckets(offset, distances.shape[0], farthest)
    return jnp.moveaxis(distances.astype(jnp.float32)[index], -1, 0)


def buckets(
    offset: Int[np.ndarray, "*shape"], count: int, farthest: int
) -> Int[np.ndarray, "*shape"]:
    """The class of each offset key - query, out of `count`.

    The first half is for keys before the query or on it, the second for later keys.
    Of each half, one half has a class per distance, the other grows logarithmically up
    to `farthest`.
    """
    half, exact = count // 2, count // 4
    distance = np.abs(offset)
    # parity: in float32, which decides at the borders between classes.
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(np.log(farthest / exact))
    far = exact + (steps * np.float32(half - exact)).astype(np.int64)
    near = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return near + np.where(offset > 0, half, 0)
