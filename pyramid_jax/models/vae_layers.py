# SPDX-License-Identifier: Apache-2.0
"""The layers of the causal video VAE, as functions (x, past) -> (y, past).

Convolutions see their own frame and the two before it, norms and attention one frame.
The past of a layer holds the few frames that its next call needs; None begins a video.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax.kernels.convolution import conv3d
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.models.linear import dense
from pyramid_jax.sharding import named

KERNEL = 3
EPS = 1e-6
# Attention logits held at once; the frames of longer clips take turns.
LOGITS = 2**26
# The original draws all kernels with deviation 0.02, as suits its widths of hundreds.
INIT = nn.initializers.lecun_normal()

Past = Any  # nested tuples of `b _ h w c`, one entry per layer; None at the start
Activations = Float[jax.Array, "b _ _ _ _"]
CausalLayer = Callable[..., tuple[Any, Past]]  # (x, past) -> (y, past)


@dataclass(frozen=True)
class Setting:
    """The settings that all layers of a network share.

    Args:
        groups: of channels that are normalised together.
        dtype: of convolutions and of what flows between layers; weights are float32.
        remat: the backward pass recomputes residual blocks instead of storing them.
        halo: how devices share the video.
    """

    groups: int
    dtype: str
    remat: bool
    halo: Halo


def chain(layers: Sequence[CausalLayer], x: Any, past: Past) -> tuple[Any, Past]:
    """Runs layers one after another, each with its own entry of the past."""
    before = (None,) * len(layers) if past is None else past
    after = []
    for layer, layer_past in zip(layers, before, strict=True):
        x, layer_past = layer(x, layer_past)
        after.append(layer_past)
    return x, tuple(after)


class Convolution(nn.Module):
    """A causal 3 x 3 x 3 convolution; `time` and `space` are its strides."""

    setting: Setting
    width: int
    time: int = 1
    space: int = 1

    @nn.compact
    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        shape = (KERNEL, KERNEL, KERNEL, x.shape[-1], self.width)
        init = named(INIT, (None, None, None, "embed", None))
        kernel = self.param("kernel", init, shape, jnp.float32)
        zeros = named(nn.initializers.zeros, (None,))
        bias = self.param("bias", zeros, (self.width,), jnp.float32)
        x, kernel, bias = (a.astype(self.setting.dtype) for a in (x, kernel, bias))

        x, past = self.setting.halo.frames(x, past, KERNEL, self.time)
        x = self.setting.halo.rows(x)
        strides = (self.time, self.space, self.space)
        y = conv3d(x, kernel, strides, (self.setting.halo.padding, (1, 1)))
        return y + bias[None, None, None, None], past


class Norm(nn.Module):
    """Group normalisation of each frame alone, in float32, then a weight and a bias."""

    setting: Setting

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        width = x.shape[-1:]
        weight = self.param("weight", named(ones, (None,)), width, jnp.float32)
        bias = self.param("bias", named(zeros, (None,)), width, jnp.float32)
        y = x.astype(jnp.float32)
        y = rearrange(y, "b t h w (g c) -> b t h w g c", g=self.setting.groups)
        y = y - self._mean(y)
        y = y * jax.lax.rsqrt(self._mean(y**2) + EPS)
        y = rearrange(y, "b t h w g c -> b t h w (g c)")
        return y * weight[None, None, None, None] + bias[None, None, None, None]

    def _mean(self, x: jax.Array) -> jax.Array:
        return self.setting.halo.mean(x.mean(axis=(2, 3, 5), keepdims=True))


class Activated(nn.Module):
    """Norm, SiLU, convolution."""

    setting: Setting
    width: int

    def setup(self):
        self.norm = Norm(self.setting)
        self.convolution = Convolution(self.setting, self.width)

    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        return self.convolution(nn.silu(self.norm(x)), past)


class Residual(nn.Module):
    """Two convolutions, added to the input or to a linear map of it."""

    setting: Setting
    width: int

    @nn.compact
    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        first = Activated(self.setting, self.width, name="first")
        second = Activated(self.setting, self.width, name="second")
        y, past = chain((first, second), x, past)
        if x.shape[-1] != self.width:
            x = linear(self.width, self.setting, name="shortcut")(x)
        return x + y, past


class Attention(nn.Module):
    """The cells of a frame attend to all cells of the same frame, with one head."""

    setting: Setting

    @nn.compact
    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        width = x.shape[-1]
        y = Norm(self.setting, name="norm")(x)
        y = rearrange(y, "b t h w c -> b t (h w) c")
        q, k, v = (
            linear(width, self.setting, name=name)(y)
            for name in ("query", "key", "value")
        )
        k, v = self.setting.halo.all_rows(k), self.setting.halo.all_rows(v)
        y = linear(width, self.setting, name="out")(_attend(q, k, v))
        return x + y.reshape(x.shape), ()


class Upsampling(nn.Module):
    """Doubles the frames, or rows and columns: new ones lie side by side in channels.

    The first frame of a video stays one frame.
    """

    setting: Setting
    width: int
    time: bool

    @nn.compact
    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        begins, parts = past is None, 2 if self.time else 4
        layer = Convolution(self.setting, parts * self.width, name="convolution")
        y, past = layer(x, past)
        if not self.time:
            to_cells = "b t h w (y x c) -> b t (h y) (w x) c"
            return rearrange(y, to_cells, y=2, x=2), past
        y = rearrange(y, "b t h w (two c) -> b (t two) h w c", two=2)
        return y[:, 1:] if begins else y, past


class Level(nn.Module):
    """Residual blocks of one resolution, then the way to the next, if it differs.

    Args:
        up: whether rows and columns (`space`) and frames (`time`) double, or halve.
    """

    setting: Setting
    up: bool
    width: int
    layers: int
    space: bool
    time: bool

    def setup(self):
        s, width = self.setting, self.width
        block = nn.remat(Residual) if s.remat else Residual
        self.residuals = [block(s, width) for _ in range(self.layers)]
        self.resampled = {
            name: self._resampling(time=name == "time")
            for name, resampled in (("space", self.space), ("time", self.time))
            if resampled
        }

    def _resampling(self, time: bool) -> nn.Module:
        if self.up:
            return Upsampling(self.setting, self.width, time)
        strides = (2, 1) if time else (1, 2)
        return Convolution(self.setting, self.width, *strides)

    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        return chain([*self.residuals, *self.resampled.values()], x, past)


class Middle(nn.Module):
    """Two residual blocks at the coarsest level with attention between them."""

    setting: Setting
    width: int

    def setup(self):
        self.first = Residual(self.setting, self.width)
        self.attention = Attention(self.setting)
        self.second = Residual(self.setting, self.width)

    def __call__(self, x: Activations, past: Past = None) -> tuple[Activations, Past]:
        return chain((self.first, self.attention, self.second), x, past)


def linear(width: int, setting: Setting, name: str | None = None) -> nn.DenseGeneral:
    """A linear map of channels, which is a convolution of one cell of one frame."""
    return dense(width, ("embed", None), setting.dtype, init=INIT).copy(name=name)


def _attend(
    q: Float[jax.Array, "b t n c"],
    k: Float[jax.Array, "b t all c"],
    v: Float[jax.Array, "b t all c"],
) -> Float[jax.Array, "b t n c"]:
    """softmax(q kᵀ / sqrt(c)) v within each frame; logits and softmax in float32."""
    scale = q.shape[-1] ** -0.5

    def attend(frame: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = frame
        logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32) * scale
        return jnp.matmul(jax.nn.softmax(logits).astype(v.dtype), v)

    frames = tuple(rearrange(a, "b t n c -> (b t) n c") for a in (q, k, v))
    at_once = max(1, LOGITS // math.prod((q.shape[2], k.shape[2])))
    out = jax.lax.map(attend, frames, batch_size=at_once)
    return rearrange(out, "(b t) n c -> b t n c", b=q.shape[0])
