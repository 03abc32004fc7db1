# SPDX-License-Identifier: Apache-2.0
"""The states between the blocks of a transformer, to find where a difference begins."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pyramid_jax.mask import joint
from pyramid_jax.models.dit import DiT, DiTConfig, DoubleBlock, SingleBlock, Stream
from pyramid_jax.models.layers import layer_norm, sinusoid
from pyramid_jax.rotary import angles
from pyramid_jax.shapes import Text, Tokens


@partial(jax.jit, static_argnums=0)
def states(
    cfg: DiTConfig,
    params: Any,
    tokens: Tokens,
    time: Float[jax.Array, "b s"],
    text: Text,
) -> dict[str, jax.Array]:
    """The states by the names that the recorded cases use, block by block."""
    dit = DiT(cfg).bind({"params": params})
    order = joint(text.segment, tokens.segment, tokens.frame, cfg.causal)
    m = text.segment.shape[1]
    angle = jnp.pad(angles(tokens.position, cfg.rope_axes), ((0, 0), (m, 0), (0, 0)))
    found = {"time_proj": sinusoid(time)}
    cond = found["temb"] = dit.time(found["time_proj"]) + dit.pooled(text.pooled)
    words = found["context"] = dit.context(text.features)
    video = dit.patch(tokens.values)
    if cfg.table is not None:
        video = video + dit._table(tokens.position)
    found["tokens"] = video

    for i in range(cfg.double_blocks):
        last = cfg.text_ends_early and i == cfg.double_blocks - 1
        weights = params["last_double"] if last else _layer(params["double"], i)
        block = DoubleBlock(cfg, text_attends_only=last)
        if i == 0 and not last:
            found |= _inside(block, weights, (words, video, cond, angle, order))
        words, video = block.apply(
            {"params": weights}, words, video, cond, angle, order
        )
        found |= {f"block{i}.hidden": video, f"block{i}.encoder": words}

    x = jnp.concatenate([words, video], axis=1)
    for i in range(cfg.single_blocks):
        weights = {"params": _layer(params["single"], i)}
        x = found[f"single{i}.hidden"] = SingleBlock(cfg).apply(
            weights, x, cond, angle, order
        )
    shift, scale = dit.head_modulation(cond, tokens.segment)
    found["norm_out"] = layer_norm(x[:, m:]) * (1 + scale) + shift
    return found


def _inside(
    block: DoubleBlock, weights: Any, inputs: tuple[Any, ...]
) -> dict[str, jax.Array]:
    """What the first block adds to its streams: after the norm, after attention."""

    def linear_out(module: Any, method: str) -> bool:
        return isinstance(module.parent, Stream) and module.name == "out"

    _, kept = block.apply(
        {"params": weights}, *inputs, capture_intermediates=linear_out
    )
    of = {
        name: kept["intermediates"][name]["out"]["__call__"][0]
        for name in ("text", "video")
    }
    words, video, cond, _, order = inputs
    stream = Stream(block.cfg).bind({"params": weights["video"]})
    affine, _ = stream.condition(cond, order.segment[:, words.shape[1] :])
    return {
        "block0.norm1.hidden": affine(layer_norm(video)),
        "block0.attn.hidden": of["video"],
        "block0.attn.encoder": of["text"],
    }


def _layer(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda weight: weight[i], stacked)
