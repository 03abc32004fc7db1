# SPDX-License-Identifier: Apache-2.0
"""The states between the blocks of a transformer, to find where a difference begins."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from launch.parity.cases import QUICK
from pyramid_jax.mask import TokenMask, joint
from pyramid_jax.models.dit import DiT, DiTConfig, DoubleBlock, SingleBlock, Stream
from pyramid_jax.models.layers import layer_norm, sinusoid
from pyramid_jax.models.rotary import angles
from pyramid_jax.shapes import Text, Tokens

States = dict[str, jax.Array]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def states(
    cfg: DiTConfig,
    params: Any,
    tokens: Tokens,
    time: Float[jax.Array, "b s"],
    text: Text,
) -> States:
    """The states by the names that the recorded cases use, layer by layer."""
    dit = DiT(cfg).bind({"params": params})
    mask = joint(text.segment, tokens.segment, tokens.frame, cfg.causal)
    m = text.segment.shape[1]
    angle = jnp.pad(angles(tokens.position, cfg.rope_axes), ((0, 0), (m, 0), (0, 0)))
    features, words = sinusoid(time), dit.text_in(text.features)
    cond = dit.time(features) + dit.pooled(text.pooled)
    video = dit.video_in(tokens.values)
    if cfg.position_table is not None:
        video = video + dit._table(tokens.position)
    values = {"time_proj": features, "temb": cond, "context": words, "tokens": video}

    constants = (cond, angle, mask)
    if "double" in params:
        (words, video), inner = _double(
            cfg, params["double"], (words, video), constants
        )
        values |= inner
    if "last_double" in params:
        block = DoubleBlock(cfg, text_attends_only=True)
        weights = {"params": params["last_double"]}
        after: Any = block.apply(weights, words, video, *constants)
        words, video = after
        values[f"block{cfg.double_blocks - 1}.hidden"] = video
    x = jnp.concatenate([words, video], axis=1)
    if "single" in params:
        x, inner = _single(cfg, params["single"], x, constants)
        values |= inner
    shift, scale = dit.head_modulation(cond, tokens.segment)
    values["norm_out"] = layer_norm(x[:, m:]) * (1 + scale) + shift
    return values


def _double(
    cfg: DiTConfig,
    weights: Any,
    state: tuple[jax.Array, jax.Array],
    constants: tuple[jax.Array, jax.Array, TokenMask],
) -> tuple[tuple[jax.Array, jax.Array], States]:
    """The streams after all equal double blocks, and what each one adds to them."""
    cond, _, mask = constants

    def step(state: tuple[jax.Array, jax.Array], layer: Any) -> tuple[Any, States]:
        words, video = state
        affine, _ = (
            Stream(cfg)
            .bind({"params": layer["video"]})
            .condition(cond, mask.segment[:, words.shape[1] :])
        )
        out: Any = DoubleBlock(cfg).apply(
            {"params": layer}, *state, *constants, capture_intermediates=_is_out
        )
        after, kept = out
        attended = {
            name: kept["intermediates"][name]["out"]["__call__"][0]
            for name in ("text", "video")
        }
        return after, {
            "norm1.hidden": affine(layer_norm(video)),
            "attn.hidden": attended["video"],
            "attn.encoder": attended["text"],
            "hidden": after[1],
            "encoder": after[0],
        }

    state, seen = jax.lax.scan(step, state, weights)
    return state, {
        f"block{i}.{name}": x[i] for name, x in seen.items() for i in range(len(x))
    }


def _is_out(module: Any, method: str) -> bool:
    """Whether `module` is the linear map after attention."""
    return isinstance(module.parent, Stream) and module.name == "out"


def _single(
    cfg: DiTConfig, weights: Any, x: jax.Array, constants: tuple[Any, ...]
) -> tuple[jax.Array, States]:
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        out: Any = SingleBlock(cfg).apply({"params": layer}, x, *constants)
        return out, out

    x, seen = jax.lax.scan(step, x, weights)
    return x, {f"single{i}.hidden": seen[i] for i in range(len(seen))}
