# SPDX-License-Identifier: Apache-2.0
"""The states between the blocks of a transformer, to find where a difference begins."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from launch.parity.cases import QUICK
from pyramid_jax.kernels.attention import AttentionPlan
from pyramid_jax.mask import joint
from pyramid_jax.models.dit import DiT
from pyramid_jax.models.dit_blocks import (
    DiTConfig,
    DoubleBlock,
    SingleBlock,
    Stream,
    TokenPlaces,
)
from pyramid_jax.models.layers import layer_norm, sinusoid
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
    m, videos = text.segment.shape[1], mask.last(tokens.segment.shape[1])
    features, words = sinusoid(time), dit.text_in(text.features)
    cond = dit.time(features) + dit.pooled(text.pooled)
    video = dit.video_in(tokens.values)
    if cfg.position_table is not None:
        video = video + dit._table(tokens.position)
    values = {"time_proj": features, "temb": cond, "context": words, "tokens": video}

    at = TokenPlaces(dit._turns(tokens.position, m), mask.segment)
    constants = at, dit._plan(mask, mask)
    end = constants[0], dit._plan(videos, mask)
    if "double" in params:
        (words, video), inner = _double(
            cfg, params["double"], cond, (words, video), constants
        )
        values |= inner
    if "last_double" in params:
        block = DoubleBlock(cfg, text_attends_only=True)
        words, video = _after(block, params["last_double"], cond, words, video, *end)
        values[f"block{cfg.double_blocks - 1}.hidden"] = video
    if "last_single" in params:
        x, singles = jnp.concatenate([words, video], axis=1), cfg.single_blocks - 1
        for i in range(singles):
            weights = jax.tree.map(lambda x, i=i: x[i], params["single"])
            x = _after(SingleBlock(cfg), weights, cond, x, *constants)
            values[f"single{i}.hidden"] = x
        # The cases also have what the last block makes of the text.
        block, weights = SingleBlock(cfg), params["last_single"]
        values[f"single{singles}.hidden"] = _after(block, weights, cond, x, *constants)
        video = _after(block, weights, cond, x, *end)
    vectors = dit.head_modulation(cond)
    shift, scale = dit.head_modulation.of_tokens(vectors, tokens.segment)
    values["norm_out"] = layer_norm(video) * (1 + scale) + shift
    return values


def _after(block: Any, weights: Any, *inputs: Any) -> Any:
    """The stream or streams that a block makes of a condition and its other inputs."""
    *streams, _ = block.apply({"params": weights}, *inputs, method="conditioned")
    return streams if len(streams) > 1 else streams[0]


def _double(
    cfg: DiTConfig,
    weights: Any,
    cond: jax.Array,
    state: tuple[jax.Array, jax.Array],
    constants: tuple[TokenPlaces, AttentionPlan],
) -> tuple[tuple[jax.Array, jax.Array], States]:
    """The streams after all equal double blocks, and what each one adds to them."""
    segment = constants[0].vectors

    def step(state: tuple[jax.Array, jax.Array], layer: Any) -> tuple[Any, States]:
        words, video = state
        stream = Stream(cfg).bind({"params": layer["video"]})
        affine, _ = stream.affine(stream.modulation(cond), segment[:, words.shape[1] :])
        out: Any = DoubleBlock(cfg).apply(
            {"params": layer},
            *(cond, *state, *constants),
            capture_intermediates=_is_out,
            method="conditioned",
        )
        (*after, _), kept = out
        attended = {
            name: kept["intermediates"][name]["out"]["__call__"][0]
            for name in ("text", "video")
        }
        return tuple(after), {
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
