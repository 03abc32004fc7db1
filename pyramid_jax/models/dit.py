# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer, which gives every token a velocity, at all stages.

Text and video tokens first attend to each other with weights of their own (double
blocks), then, in the miniFLUX variant, as one sequence with shared weights (single
blocks). A row may hold several segments, each with its own time and prompt. A variant
is a `DiTConfig`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.exchange import by_heads, by_tokens
from pyramid_jax.mask import TokenMask, joint
from pyramid_jax.models import layers
from pyramid_jax.models.layers import Affine, RMSNorm, dense, fused_qkv, layer_norm
from pyramid_jax.models.rotary import angles, rotate
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.sharding import constrain, shares


@dataclass(frozen=True)
class DiTConfig:
    """Everything that tells one transformer from another.

    Args:
        rope_axes: head features rotated by frame, y, x; (head_dim,): by frame alone.
        position_table: side of the table that is added to the tokens; None: no table.
        position_table_base: side, in cells, of the image model that it was made for.
        text_ends_early: the last double block attends to the text, but leaves it.
        causal: frames don't see later frames; False is the reference's ablation.
        dtype: of matrix products and of what flows between blocks; weights are float32.
        remat: the backward pass recomputes each block instead of storing its inside.
        attention: backend name for `kernels.attention`, None for the device's best.
        attention_tiles: block sizes of that backend, see `Tiles.of`; None: the table's.
    """

    width: int = 1536
    heads: int = 24
    double_blocks: int = 24
    single_blocks: int = 0
    patch_values: int = 64
    text_width: int = 4096
    pooled_width: int = 2048
    rope_axes: tuple[int, ...] = (64,)
    position_table: int | None = 192
    position_table_base: int = 64
    qk_eps: float = 1e-5
    text_ends_early: bool = True
    causal: bool = True
    dtype: str = "float32"
    remat: bool = True
    attention: str | None = None
    attention_tiles: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if self.width % self.heads or sum(self.rope_axes) != self.width // self.heads:
            raise ValueError(
                f"width {self.width} over {self.heads} heads must equal the sum of "
                f"rope_axes {self.rope_axes}; for 64 features per head use (64,) or "
                "(16, 24, 24)"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Stream(nn.Module):
    """The weights of one modality (text or video) inside a `DoubleBlock`."""

    cfg: DiTConfig
    attends_only: bool = False

    def setup(self):
        c, vectors = self.cfg, 2 if self.attends_only else 6
        self.modulation = layers.Modulation(vectors, c.width, c.dtype)
        self.qkv = fused_qkv(c.heads, c.head_dim, c.dtype)
        self.q_norm, self.k_norm = RMSNorm(c.qk_eps), RMSNorm(c.qk_eps)
        if not self.attends_only:
            self.out = dense(c.width, ("heads", None, "embed"), c.dtype, contract=2)
            self.mlp_in = dense(4 * c.width, ("embed", "mlp"), c.dtype)
            self.mlp_out = dense(c.width, ("mlp", "embed"), c.dtype)

    def condition(self, cond: jax.Array, segment: jax.Array) -> tuple[Affine, Affine]:
        """How a segment's time and prompt change what is around attention and MLP."""
        vectors = self.modulation(cond, segment)
        # What a stream that only attends lacks is not used.
        vectors += [jnp.zeros_like(vectors[0])] * (6 - len(vectors))
        return Affine(*vectors[:3]), Affine(*vectors[3:])

    def project(
        self, x: Float[jax.Array, "b n d"], affine: Affine
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values, `b n heads dim` each."""
        q, k, v = jnp.moveaxis(by_heads(self.qkv(affine(layer_norm(x)))), 2, 0)
        return self.q_norm(q), self.k_norm(k), v

    def absorb(
        self,
        x: Float[jax.Array, "b n d"],
        attended: jax.Array,
        attn: Affine,
        mlp: Affine,
    ) -> Float[jax.Array, "b n d"]:
        """Adds what attention brought, then the MLP's part."""
        if self.attends_only:
            return x
        x = attn.add(x, self.out(attended))
        hidden = nn.gelu(self.mlp_in(mlp(layer_norm(x))), approximate=True)
        return mlp.add(x, self.mlp_out(hidden))


class DoubleBlock(nn.Module):
    """Text and video tokens attend to each other, each with weights of its own."""

    cfg: DiTConfig
    text_attends_only: bool = False

    def setup(self):
        self.text = Stream(self.cfg, self.text_attends_only)
        self.video = Stream(self.cfg)

    def __call__(
        self,
        text: Float[jax.Array, "b m d"],
        video: Float[jax.Array, "b n d"],
        cond: Float[jax.Array, "b s d"],
        angle: Float[jax.Array, "b l r"],
        mask: TokenMask,
    ) -> tuple[Float[jax.Array, "b m d"], Float[jax.Array, "b n d"]]:
        m = text.shape[1]
        text_segment, segment = jnp.split(mask.segment, [m], axis=1)
        text_attn, text_mlp = self.text.condition(cond, text_segment)
        video_attn, video_mlp = self.video.condition(cond, segment)

        parts = zip(
            self.text.project(text, text_attn),
            self.video.project(video, video_attn),
            strict=True,
        )
        q, k, v = (jnp.concatenate(part, axis=1) for part in parts)
        q, k, c = rotate(q, angle), rotate(k, angle), self.cfg
        out = attention(q, k, v, mask, c.attention, c.attention_tiles)
        to_text, to_video = (
            by_tokens(part, c.heads) for part in jnp.split(out, [m], axis=1)
        )

        return (
            self.text.absorb(text, to_text, text_attn, text_mlp),
            self.video.absorb(video, to_video, video_attn, video_mlp),
        )


class SingleBlock(nn.Module):
    """Text and video as one sequence: attention and MLP side by side, one output."""

    cfg: DiTConfig

    def setup(self):
        c = self.cfg
        self.modulation = layers.Modulation(3, c.width, c.dtype)
        self.qkv = fused_qkv(c.heads, c.head_dim, c.dtype)
        self.q_norm, self.k_norm = RMSNorm(c.qk_eps), RMSNorm(c.qk_eps)
        self.mlp_in = dense(4 * c.width, ("embed", "mlp"), c.dtype)
        self.out = dense(c.width, ("heads", None, "embed"), c.dtype, contract=2)
        self.mlp_out = dense(c.width, ("mlp", "embed"), c.dtype, bias=False)

    def __call__(
        self,
        x: Float[jax.Array, "b l d"],
        cond: Float[jax.Array, "b s d"],
        angle: Float[jax.Array, "b l r"],
        mask: TokenMask,
    ) -> Float[jax.Array, "b l d"]:
        c, affine = self.cfg, Affine(*self.modulation(cond, mask.segment))
        y = affine(layer_norm(x))
        q, k, v = jnp.moveaxis(by_heads(self.qkv(y)), 2, 0)
        q, k = rotate(self.q_norm(q), angle), rotate(self.k_norm(k), angle)
        out = attention(q, k, v, mask, c.attention, c.attention_tiles)
        attended = by_tokens(out, c.heads)
        hidden = nn.gelu(self.mlp_in(y), approximate=True)
        return affine.add(x, self.out(attended) + self.mlp_out(hidden))


class DiT(nn.Module):
    """Computes the velocity of all video tokens; that of history means nothing."""

    cfg: DiTConfig

    def setup(self):
        c = self.cfg
        small = nn.initializers.normal(0.02)
        zeros = nn.initializers.zeros
        self.video_in = dense(c.width, (None, "embed"), c.dtype)
        self.text_in = dense(c.width, (None, "embed"), c.dtype, init=small)
        embedder = partial(layers.Embedder, c.width, c.dtype)
        self.time, self.pooled = embedder(), embedder()

        last = int(c.text_ends_early)
        doubles, singles = DoubleBlock(c, parent=None), SingleBlock(c, parent=None)
        self.double = self._stack("double", doubles, c.double_blocks - last, streams=2)
        self.last_double = DoubleBlock(c, text_attends_only=True) if last else None
        self.single = self._stack("single", singles, c.single_blocks, streams=1)

        self.head_modulation = layers.Modulation(2, c.width, c.dtype)
        self.head = dense(c.patch_values, ("embed", None), c.dtype, init=zeros)

    def __call__(
        self, tokens: Tokens, time: Float[jax.Array, "b s"], text: Text
    ) -> Float[jax.Array, "b n p"]:
        """
        Args:
            tokens: patches with positions, of each segment the history and the unit.
            time: the network's clock of each segment, 0..1000.
            text: features, and the pooled vector of each segment.
        """
        c, m, n = self.cfg, text.segment.shape[1], tokens.segment.shape[1]
        tokens = tokens.filled(shares("tokens"))
        mask = joint(text.segment, tokens.segment, tokens.frame, c.causal)
        mask = TokenMask(*(constrain(x, ("batch", None)) for x in mask))
        angle = angles(tokens.position, c.rope_axes)
        angle = jnp.pad(angle, ((0, 0), (m, 0), (0, 0)))  # text stands at position 0
        angle = constrain(angle, ("batch", None, None))

        words = self.text_in(text.features)
        video = self.video_in(tokens.values)
        if c.position_table is not None:
            video = video + self._table(tokens.position).astype(video.dtype)
        cond = self.time(layers.sinusoid(time)) + self.pooled(text.pooled)

        inputs = (cond, angle, mask)
        run = partial(layers.scan, axes=("batch", "tokens", None), remat=c.remat)
        if self.double is not None:
            block = DoubleBlock(c, parent=None)
            words, video = run(block, self.double, (words, video), *inputs)
        if self.last_double is not None:
            words, video = self.last_double(words, video, *inputs)
        if self.single is not None:
            block, x = SingleBlock(c, parent=None), jnp.concatenate([words, video], 1)
            (x,) = run(block, self.single, (x,), *inputs)
            video = x[:, m:]

        shift, scale = self.head_modulation(cond, tokens.segment)
        out = self.head(layer_norm(video) * (1 + scale) + shift)
        return out[:, :n].astype(jnp.float32)

    def _table(self, position: Float[jax.Array, "b n 3"]) -> Float[jax.Array, "b n d"]:
        """The position table, x in the first half of the width and y in the second."""
        c = self.cfg
        assert c.position_table is not None
        table = layers.position_table(c.position_table, c.position_table_base, c.width)
        y, x = (layers.interpolate_table(table, position[..., axis]) for axis in (1, 2))
        return jnp.concatenate([x, y], axis=-1)

    def _stack(self, name: str, block: nn.Module, count: int, streams: int) -> Any:
        """The weights of `count` equal blocks of so many streams; None without any."""
        c = self.cfg

        def init(key: jax.Array) -> Any:
            token = jnp.zeros((1, 1, c.width), jnp.float32)
            angle = jnp.zeros((1, streams, c.head_dim // 2), jnp.float32)
            order = jnp.zeros((1, streams), jnp.int32)
            inputs = (*[token] * streams, token, angle, TokenMask(order, order))
            return layers.stacked(key, block, count, *inputs)

        return self.param(name, init) if count else None


def initialise_dit(cfg: DiTConfig, key: jax.Array) -> Any:
    """Fresh weights, in boxes that name the axes of each."""
    time, order = jnp.zeros((1, 1), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    patches, position = (
        jnp.zeros((1, 1, cfg.patch_values), jnp.float32),
        jnp.zeros((1, 1, 3), jnp.float32),
    )
    features = jnp.zeros((1, 1, cfg.text_width), jnp.float32)
    pooled = jnp.zeros((1, 1, cfg.pooled_width), jnp.float32)
    tokens = Tokens(patches, position, order, order)
    text = Text(features, order, pooled)
    return DiT(cfg).init(key, tokens, time, text)["params"]
