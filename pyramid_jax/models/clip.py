# SPDX-License-Identifier: Apache-2.0
"""The text encoders of CLIP, which give one vector per prompt.

Attention is causal, so nothing that follows the end of a text changes its vector.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int

from pyramid_jax.kernels.attention import attention
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.layers import layer_norm, scan, stacked
from pyramid_jax.models.linear import dense, fused_qkv
from pyramid_jax.sharding import named


@dataclass(frozen=True)
class CLIPConfig:
    """The defaults are CLIP ViT-L/14.

    Args:
        positions: most tokens of a text.
        quick_gelu: x σ(1.702 x) in the MLP; False: the exact GELU.
        end: id of the token whose state is the vector; None: the largest id in a row.
        projection: width of the vector after a linear map; None: there is none.
        dtype: of matrix products; the stream between blocks is float32.
    """

    vocabulary: int = 49408
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    blocks: int = 12
    positions: int = 77
    quick_gelu: bool = True
    end: int | None = None
    projection: int | None = None
    eps: float = 1e-5
    dtype: str = "float32"

    @property
    def vector_width(self) -> int:
        """Width of the vector of a text."""
        return self.width if self.projection is None else self.projection


class Encoding(NamedTuple):
    """Normalised states of all tokens, and the vector of each text."""

    features: Float[jax.Array, "b m d"]
    pooled: Float[jax.Array, "b p"]


class CLIPEncoder(nn.Module):
    """Encodes the text in each row as the state at its end, projected or not.

    Source: `CLIPTextModel` and `CLIPTextModelWithProjection` of transformers.
    """

    cfg: CLIPConfig

    def setup(self):
        c = self.cfg
        normal = named(nn.initializers.normal(0.02), (None, "embed"))
        self.words = self.param("words", normal, (c.vocabulary, c.width))
        self.positions = self.param("positions", normal, (c.positions, c.width))
        order = jnp.zeros((1, 1), jnp.int32)
        inputs = jnp.zeros((1, 1, c.width), jnp.float32), TokenMask(order, order)
        block = CLIPBlock(c, parent=None)
        self.blocks = self.param(
            "blocks", lambda key: stacked(key, block, c.blocks, *inputs)
        )
        self.norm = LayerNorm(c.eps)
        if c.projection is not None:
            axes = ("embed", None)
            self.project = dense(c.projection, axes, c.dtype, bias=False)

    def __call__(self, ids: Int[jax.Array, "b m"]) -> Encoding:
        c = self.cfg
        block, mask = CLIPBlock(c, parent=None), self.mask(ids)

        def run(weights: Any, _: None, x: jax.Array) -> Any:
            return block.apply({"params": weights}, x, mask)

        (x,) = scan(run, self.blocks, (self.embed(ids),))
        x = self.norm(x)
        # parity: released config files name an end that their tokenizers don't use.
        end = ids.argmax(-1) if c.end is None else (ids == c.end).argmax(-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        if c.projection is not None:
            pooled = self.project(pooled).astype(jnp.float32)
        return Encoding(x, pooled)

    def embed(self, ids: Int[jax.Array, "b m"]) -> Float[jax.Array, "b m d"]:
        """The stream before the first block."""
        x = jnp.take(self.words, ids, axis=0).astype(jnp.float32)
        return x + self.positions[None, : ids.shape[1]].astype(jnp.float32)

    def mask(self, ids: Int[jax.Array, "b m"]) -> TokenMask:
        """A token sees itself and those before it."""
        order = jnp.broadcast_to(
            jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape
        )
        return TokenMask(jnp.zeros_like(ids), order)


class CLIPBlock(nn.Module):
    """Causal attention, then an MLP, both added to the stream."""

    cfg: CLIPConfig

    def setup(self):
        c = self.cfg
        self.attention_norm, self.mlp_norm = LayerNorm(c.eps), LayerNorm(c.eps)
        self.qkv = fused_qkv(c.heads, c.width // c.heads, c.dtype)
        self.out = dense(c.width, ("heads", None, "embed"), c.dtype, contract=2)
        self.mlp_in = dense(c.mlp_width, ("embed", "mlp"), c.dtype)
        self.mlp_out = dense(c.width, ("mlp", "embed"), c.dtype)

    def __call__(
        self, x: Float[jax.Array, "b m d"], mask: TokenMask
    ) -> Float[jax.Array, "b m d"]:
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        x = x + self.out(attention(q, k, v, mask)).astype(jnp.float32)
        hidden = self._activate(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out(hidden).astype(jnp.float32)

    def _activate(self, x: jax.Array) -> jax.Array:
        if self.cfg.quick_gelu:
            return x * nn.sigmoid(1.702 * x)
        return nn.gelu(x, approximate=False)


class LayerNorm(nn.Module):
    """Zero mean and unit variance, in float32, times a weight, plus a bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[jax.Array, "b m d"]) -> Float[jax.Array, "b m d"]:
        shape = (x.shape[-1],)
        weight = self.param("weight", named(nn.initializers.ones, (None,)), shape)
        bias = self.param("bias", named(nn.initializers.zeros, (None,)), shape)
        weight, bias = (p.astype(jnp.float32)[None, None] for p in (weight, bias))
        return layer_norm(x, self.eps) * weight + bias
