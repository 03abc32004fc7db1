# SPDX-License-Identifier: Apache-2.0
"""The text encoders, alone and together, from recorded token ids.

Features of padding mean nothing and are not compared: in the original padding sees the
words, here it sees nothing.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.parity.cases import QUICK, TEXT, Answer, Case, Scenario
from pyramid_jax.checkpoint.tensors import read_tensors
from pyramid_jax.models.clip import CLIPBlock, CLIPConfig, CLIPEncoder, Encoding
from pyramid_jax.models.t5 import T5Block, T5Config, T5Encoder
from pyramid_jax.pipeline.prompts import Ids, Network, encode_prompts, network


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "in.input_ids" in scenario.tensors or "in.t5_input_ids" in scenario.tensors


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded call of one text encoder, or of all of a model."""
    tensors = read_tensors(case.weights())
    if "in.t5_input_ids" in scenario.tensors:
        yield from _together(scenario, tensors)
        return
    name = scenario.settings["model_class"].split(".")[-1]
    config = scenario.settings["config"] | {"architectures": [name]}
    one = network(config, tensors)
    ids = jnp.asarray(scenario.tensors["in.input_ids"], jnp.int32)
    valid = scenario.tensors["in.attention_mask"]
    if "d_model" in config:
        yield from _t5(one, ids, valid)
    else:
        yield from _clip(one, ids, valid)


def _together(scenario: Scenario, tensors: Mapping[str, Any]) -> Iterator[Answer]:
    networks = []
    for name, config in scenario.settings["configs"].items():
        start = f"{name}."
        own = {
            k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)
        }
        projects = "text_projection.weight" in own
        kind = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
        networks.append(network(config | {"architectures": [kind]}, own))
    *clips, t5 = networks
    valid = scenario.tensors["in.t5_attention_mask"]
    names = ("in.clip_input_ids", "in.clip2_input_ids")[: len(clips)]
    ids = Ids(
        scenario.tensors["in.t5_input_ids"].astype(np.int32),
        _segment(valid),
        tuple(scenario.tensors[name].astype(np.int32) for name in names),
    )
    text = encode_prompts((t5, *clips), ids)
    where = valid[..., None] > 0
    yield Answer("out.prompt_embeds", text.features, TEXT, where=where)
    yield Answer("out.prompt_attention_mask", np.asarray(text.segment) >= 0, 0.0)
    yield Answer("out.pooled_prompt_embeds", text.pooled[:, 0], TEXT)


def _t5(one: Network, ids: jax.Array, valid: np.ndarray) -> Iterator[Answer]:
    segment = jnp.asarray(_segment(valid))
    where = valid[..., None] > 0
    *before, last = _t5_states(one.cfg, one.params, ids, segment)
    for i, state in enumerate([*before[1:], last]):
        yield Answer(f"out.hidden_states.{i}", state, TEXT, where=where)
    yield Answer("out.last_hidden_state", last, TEXT, where=where)
    bias, *_, last = _t5_states(one.cfg, one.params, ids, jnp.zeros_like(segment))
    yield Answer("out.last_hidden_state_nomask", last, TEXT)
    yield Answer("mid.position_bias", bias[:1], TEXT)


def _clip(one: Network, ids: jax.Array, valid: np.ndarray) -> Iterator[Answer]:
    """Attention is causal and padding comes last: a mask of padding changes nothing."""
    out, states = _clip_states(one.cfg, one.params, ids)
    for start, where in (("out", None), ("out.masked", valid[..., None] > 0)):
        yield Answer(f"{start}.last_hidden_state", out.features, TEXT, where=where)
        for i, state in enumerate(states):
            yield Answer(f"{start}.hidden_states.{i}", state, TEXT, where=where)
        for name in ("pooler_output", "text_embeds"):
            yield Answer(f"{start}.{name}", out.pooled, TEXT)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _t5_states(
    cfg: T5Config, params: Any, ids: jax.Array, segment: jax.Array
) -> list[jax.Array]:
    """The bias, the stream before each block, and the features."""
    encoder = T5Encoder(cfg).bind({"params": params})
    bias = encoder.bias(segment)
    block = T5Block(cfg, parent=None)
    states = list(_states(block, params, encoder.embed(ids), bias))
    return [bias, *states[:-1], encoder(ids, segment)]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _clip_states(
    cfg: CLIPConfig, params: Any, ids: jax.Array
) -> tuple[Encoding, list[jax.Array]]:
    """What the encoder returns, and the stream before and after each block."""
    encoder = CLIPEncoder(cfg).bind({"params": params})
    block = CLIPBlock(cfg, parent=None)
    states = list(_states(block, params, encoder.embed(ids), encoder.mask(ids)))
    return encoder(ids), states


def _states(block: Any, params: Any, x: Any, constant: Any) -> Iterator[Any]:
    """The stream before the first block and after each one."""
    yield x
    for i in range(block.cfg.blocks):
        layer = jax.tree.map(lambda stack, i=i: stack[i], params["blocks"])
        x = block.apply({"params": layer}, x, constant)
        yield x


def _segment(valid: np.ndarray) -> np.ndarray:
    return np.where(valid > 0, 0, -1).astype(np.int32)
