# SPDX-License-Identifier: Apache-2.0
"""The blocks of the diffusion transformer, and the config that tells one from another.

A block reads vectors that modulate it, its streams of tokens, their places, the plan of
attention, which is the same for all blocks, and keys and values of a past that was
read before, if there is one. It returns its streams, and their keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int

from pyramid_jax.kernels.attention import AttentionPlan, attend
from pyramid_jax.kernels.exchange import (
    by_heads,
    by_tokens,
    divides_evenly,
    groups,
    in_groups,
    of_groups,
)
from pyramid_jax.kernels.joining import Group, Projection, joined, sent_by_heads
from pyramid_jax.kernels.quantised import rounded_product
from pyramid_jax.models import layers
from pyramid_jax.models.layers import Affine, RMSNorm, Vectors, layer_norm, rms_norm
from pyramid_jax.models.linear import FusedQKV, dense
from pyramid_jax.models.rotary import Turns, rotate
from pyramid_jax.shapes import Array


@dataclass(frozen=True)
class DiTConfig:
    """Everything that tells one transformer from another.

    Args:
        rope_axes: head features rotated by frame, y, x; (head_dim,): by frame alone.
        position_table: side of the table that is added to the tokens; None: no table.
        position_table_base: side, in cells, of the image model that it was made for.
        text_ends_early: the last double block attends to the text, but leaves it.
        causal: frames don't see later frames; False is the reference's ablation.
        clean_history: text and history are modulated as at time 0, whatever the time of
            the current tokens; then nothing that is made of them depends on the step.
        dtype: of matrix products and of what flows between blocks; weights are float32.
        products: of the blocks' linear maps, "exact", or rounded to "int8" or "fp8".
        remat: what is stored of a block for the backward pass, one of `layers.REMAT`;
            the rest is computed again.
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
    clean_history: bool = False
    dtype: str = "float32"
    products: str = "exact"
    remat: str = layers.NOTHING
    attention: str | None = None
    attention_tiles: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if self.width % self.heads or sum(self.rope_axes) != self.width // self.heads:
            raise ValueError(
                f"width {self.width} over {self.heads} heads must equal the sum of "
                f"rope_axes {self.rope_axes}; for 64 features per head use (64,) or "
                "(16, 24, 24)"
            )
        if self.clean_history and not self.causal:
            raise ValueError(
                "clean_history needs causal: without causality the history depends on "
                "the current frames at every step; leave out one of the two"
            )
        rounded_product(self.products)  # or there is no such kind
        if self.remat not in layers.REMAT:
            raise ValueError(f"remat {self.remat!r} must be one of {layers.REMAT}")

    @property
    def precision(self) -> str:
        """The name by which `pipeline.video.load` selects this dtype and products."""
        return self.dtype if self.products == "exact" else self.products

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def depths(self) -> dict[str, int]:
        """How many blocks there are by the names of their weights, in their order."""
        last_double, last_single = (
            int(self.text_ends_early),
            int(self.single_blocks > 0),
        )
        return {
            "double": self.double_blocks - last_double,
            "last_double": last_double,
            "single": self.single_blocks - last_single,
            "last_single": last_single,
        }


class TokenPlaces(NamedTuple):
    """Where the tokens of a row are: rotations, and the vectors that modulate them."""

    turns: Turns
    vectors: Int[Array, "b l"]


class KeyValues(NamedTuple):
    """Keys and values of tokens in one block, or of all blocks along first axes."""

    keys: Float[jax.Array, "... b _ heads dim"]
    values: Float[jax.Array, "... b _ heads dim"]

    def after(self, past: "KeyValues | None") -> "KeyValues":
        """Those of the past, if there is one, and these."""
        if past is None:
            return self
        return KeyValues(*(jnp.concatenate(x, 1) for x in zip(past, self, strict=True)))


def project(weights: Any, x: Float[jax.Array, "b n d"]) -> Projection:
    """Queries, keys and values of tokens; `weights` are a stream's, or a block's."""
    dim, bias = weights.cfg.head_dim, jnp.asarray(weights.qkv.bias)
    norms = weights.q_norm.weight(dim), weights.k_norm.weight(dim)
    return Projection(weights.qkv(x), bias, *norms)


def attend_to_all(
    c: DiTConfig,
    inputs: Sequence[tuple[Any, Float[jax.Array, "b _ d"]]],
    turns: Turns,
    plan: AttentionPlan,
    past: KeyValues | None,
    cut: int = 0,
) -> tuple[tuple[jax.Array, jax.Array], KeyValues]:
    """What attention brings to tokens, and their keys and values.

    Args:
        inputs: weights and tokens of every stream.
        cut: the results of so many first queries are an array of their own.
    """
    count = groups(sum(x.shape[1] for _, x in inputs), c.heads)
    made = of_all(c, inputs, turns, plan.backend, count)
    before = [in_groups(x, count) for x in past] if past else [[None] * count] * 2
    results, news = [], []
    for (q, k, v), *old in zip(made, *before, strict=True):
        q, new = q[:, -plan.asking :], KeyValues(k, v)
        k, v = new.after(None if past is None else KeyValues(*old))
        found = attend(q, k, v, plan, cut)
        results.append([by_tokens(x, c.heads // count) for x in found])
        news.append(new)
    first, rest = (of_groups(each) for each in zip(*results, strict=True))
    return (first, rest), KeyValues(*map(of_groups, zip(*news, strict=True)))


def of_all(
    c: DiTConfig,
    inputs: Sequence[tuple[Any, Float[jax.Array, "b _ d"]]],
    turns: Turns,
    backend: str,
    count: int,
) -> list[Group]:
    """Queries, keys and values of all tokens, in so many groups of heads."""
    how = query_key_value, c.qk_eps
    streams = [project(*each) for each in inputs if each[1].shape[1]]
    if len(streams) == 1 and divides_evenly(streams[0].qkv.shape[1], c.heads):
        return sent_by_heads(*how, streams[0], turns, backend, count)
    groups = [
        [
            stream._replace(qkv=by_heads(qkv), bias=bias)
            for qkv, bias in zip(
                *(in_groups(x, count) for x in stream[:2]), strict=True
            )
        ]
        for stream in streams
    ]
    return [joined(*how, each, turns, backend) for each in zip(*groups, strict=True)]


def query_key_value(
    streams: Sequence[Projection], turns: tuple[jax.Array, jax.Array], eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys of all streams, normalised, turned and joined, and values."""
    parts = []
    for qkv, bias, *weights in streams:
        q, k, v = jnp.moveaxis(qkv + bias.astype(qkv.dtype)[None, None], 2, 0)
        normed = (rms_norm(x, w, eps) for x, w in zip((q, k), weights, strict=True))
        parts.append((*normed, v))
    q, k, v = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return rotate(q, Turns(*turns)), rotate(k, Turns(*turns)), v


class Stream(nn.Module):
    """The weights of one modality (text or video) inside a `DoubleBlock`."""

    cfg: DiTConfig
    attends_only: bool = False

    def setup(self):
        c, vectors = self.cfg, 2 if self.attends_only else 6
        self.modulation = layers.Modulation(vectors, c.width, c.dtype)
        self.qkv = FusedQKV(c.heads, c.head_dim, c.dtype, c.products)
        self.q_norm, self.k_norm = RMSNorm(c.qk_eps), RMSNorm(c.qk_eps)
        if not self.attends_only:
            linear = partial(dense, dtype=c.dtype, products=c.products)
            self.out = linear(c.width, ("heads", None, "embed"), contract=2)
            self.mlp_in = linear(4 * c.width, ("embed", "mlp"))
            self.mlp_out = linear(c.width, ("mlp", "embed"))

    def affine(self, vectors: Vectors, segment: jax.Array) -> tuple[Affine, Affine]:
        """How a segment's time and prompt change what is around attention and MLP."""
        parts = self.modulation.of_tokens(vectors, segment)
        # What a stream that only attends lacks is not used.
        parts += [jnp.zeros_like(parts[0])] * (6 - len(parts))
        return Affine(*parts[:3]), Affine(*parts[3:])

    def absorb(
        self,
        x: Float[jax.Array, "b n d"],
        attended: jax.Array,
        attn: Affine,
        mlp: Affine,
    ) -> Float[jax.Array, "b n d"]:
        """Adds what attention brought, then the MLP's part."""
        x = attn.add(x, self.out(attended))
        hidden = nn.gelu(self.mlp_in(mlp(layer_norm(x))), approximate=True)
        return mlp.add(x, self.mlp_out(hidden))


class Block(nn.Module):
    """A block takes the vectors that modulate it, which are made of a condition."""

    def conditioned(self, cond: Float[jax.Array, "b s d"], *inputs: Any) -> Any:
        """The block's result where its vectors are not known yet."""
        return self(self.vectors(cond), *inputs)


class DoubleBlock(Block):
    """Text and video tokens attend to each other, each with weights of its own.

    The last one may need fewer answers: where the text only attends, the plan has
    queries of video tokens alone, and of these only the last ones go on.
    """

    cfg: DiTConfig
    text_attends_only: bool = False
    streams = 2

    def setup(self):
        self.text = Stream(self.cfg, self.text_attends_only)
        self.video = Stream(self.cfg)

    def vectors(self, cond: Float[jax.Array, "b s d"]) -> tuple[Vectors, Vectors]:
        """The modulations of text and video."""
        return self.text.modulation(cond), self.video.modulation(cond)

    def __call__(
        self,
        vectors: tuple[Vectors, Vectors],
        text: Float[jax.Array, "b m d"],
        video: Float[jax.Array, "b n d"],
        at: TokenPlaces,
        plan: AttentionPlan,
        past: KeyValues | None = None,
    ) -> tuple[Float[jax.Array, "b m d"], Float[jax.Array, "b _ d"], KeyValues]:
        c, m = self.cfg, text.shape[1]
        of_text, of_video = jnp.split(at.vectors, [m], axis=1)
        text_attn, text_mlp = self.text.affine(vectors[0], of_text)
        video_attn, video_mlp = self.video.affine(vectors[1], of_video)

        inputs = (
            (self.text, text_attn(layer_norm(text))),
            (self.video, video_attn(layer_norm(video))),
        )
        cut = 0 if self.text_attends_only else m
        asked = c, inputs, at.turns, plan, past, cut
        (to_text, to_video), new = attend_to_all(*asked)
        if self.text_attends_only:
            video = video[:, -plan.asking :]
            return text, self.video.absorb(video, to_video, video_attn, video_mlp), new
        return (
            self.text.absorb(text, to_text, text_attn, text_mlp),
            self.video.absorb(video, to_video, video_attn, video_mlp),
            new,
        )


class SingleBlock(Block):
    """Text and video as one sequence: attention and MLP side by side, one output.

    Those tokens go on that the plan has queries for, which are the last ones.
    """

    cfg: DiTConfig
    streams = 1

    def setup(self):
        c = self.cfg
        self.modulation = layers.Modulation(3, c.width, c.dtype)
        self.qkv = FusedQKV(c.heads, c.head_dim, c.dtype, c.products)
        self.q_norm, self.k_norm = RMSNorm(c.qk_eps), RMSNorm(c.qk_eps)
        linear = partial(dense, dtype=c.dtype, products=c.products)
        self.mlp_in = linear(4 * c.width, ("embed", "mlp"))
        self.out = linear(c.width, ("heads", None, "embed"), contract=2)
        self.mlp_out = linear(c.width, ("mlp", "embed"), bias=False)

    def vectors(self, cond: Float[jax.Array, "b s d"]) -> Vectors:
        """The modulation."""
        return self.modulation(cond)

    def __call__(
        self,
        vectors: Vectors,
        x: Float[jax.Array, "b l d"],
        at: TokenPlaces,
        plan: AttentionPlan,
        past: KeyValues | None = None,
    ) -> tuple[Float[jax.Array, "b _ d"], KeyValues]:
        c, asking = self.cfg, plan.asking
        affine = Affine(*self.modulation.of_tokens(vectors, at.vectors))
        y = affine(layer_norm(x))
        (_, attended), new = attend_to_all(c, [(self, y)], at.turns, plan, past)
        x, y = x[:, -asking:], y[:, -asking:]
        hidden = nn.gelu(self.mlp_in(y), approximate=True)
        return affine.add(x, self.out(attended) + self.mlp_out(hidden)), new
