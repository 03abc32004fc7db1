# SPDX-License-Identifier: Apache-2.0
"""The transformer of a recorded case, from its weights as the original stores them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from launch.parity.cases import QUICK, Case, Scenario
from pyramid_jax.checkpoint import dit_tables, rename, tensors
from pyramid_jax.convert import configs
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.layout import Layout
from pyramid_jax.models.dit import DiT, DiTConfig
from pyramid_jax.shapes import Text, Tokens


class Model(NamedTuple):
    """A transformer with weights, how it cuts tokens, and its table of names."""

    cfg: DiTConfig
    layout: Layout
    params: Any
    table: dit_tables.Table


def load(case: Case, settings: dict[str, Any]) -> Model:
    """The transformer of a case, with the scenario's changes of its constructor."""
    constructor = settings["constructor"] | settings.get("constructor_overrides", {})
    units = settings.get("frame_per_unit", 1)
    return _load(
        json.dumps(constructor, sort_keys=True), case.weights().resolve(), units
    )


@lru_cache(maxsize=4)
def _load(constructor: str, weights: Path, units: int) -> Model:
    arguments = configs.dit_config(json.loads(constructor))
    cfg = DiTConfig(**arguments.dit)
    layout = Layout(**arguments.layout, frames_per_unit=units)
    table, theirs = tensor_table(cfg), tensors.read_tensors(weights)
    params = rename.convert_tensors(theirs, table, abstract_weights(cfg))
    return Model(cfg, layout, jax.tree.map(jnp.asarray, params), table)


def velocity(
    cfg: DiTConfig, params: Any, tokens: Tokens, time: jax.Array, words: Text
) -> Float[jax.Array, "b n p"]:
    """The velocity of every token."""
    inputs = jax.tree.map(jnp.asarray, (tokens, time, words))
    out: Any = DiT(cfg).apply({"params": params}, *inputs)
    return out


compiled_velocity = jax.jit(velocity, static_argnums=0, compiler_options=QUICK)


def text(
    features: Float[np.ndarray, "bs m text"],
    valid: np.ndarray,
    pooled: Float[np.ndarray, "bs pooled"],
    segments: int = 1,
) -> Text:
    """Recorded text as rows: theirs r is segment r % segments of row r // segments.

    Args:
        valid: 1 for text tokens, 0 for padding, `bs m`.
    """
    index = np.arange(segments)[None, :, None]
    of = rearrange(valid, "(b s) m -> b s m", s=segments) > 0
    return Text(
        rearrange(features, "(b s) m text -> b (s m) text", s=segments),
        rearrange(np.where(of, index, -1), "b s m -> b (s m)").astype(np.int32),
        rearrange(pooled, "(b s) pooled -> b s pooled", s=segments),
    )


def recorded_text(scenario: Scenario, prefix: str) -> tuple[np.ndarray, ...]:
    """Features, valid tokens and pooled vector under a prefix such as `in.pos.`"""
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    return tuple(scenario.tensors[prefix + name] for name in names)
