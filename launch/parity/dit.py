# SPDX-License-Identifier: Apache-2.0
"""Calls of the transformer, alone or as a packed training batch with gradients.

The original runs the lists of clips of a batch side by side; here they are the segments
of one packed row, as in training.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from launch.parity import blocks
from launch.parity.cases import DIT, LOSS, QUICK, Answer, Case, Scenario, latent_back
from launch.parity.model import Model, compiled_velocity, load, text, velocity
from pyramid_jax import layout, mask, objective
from pyramid_jax.checkpoint import rename
from pyramid_jax.models import rotary
from pyramid_jax.shapes import Rows, Text, Tokens

TIME_FEATURES = 1e-4  # two float32 steps of the largest angle


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "in.sample.0.0" in scenario.tensors and "constructor" in scenario.settings


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded call of the transformer."""
    model = load(case, scenario.settings)
    lists = _lists(scenario)
    parts = [_tokens(clips, model) for clips in lists]
    row = _pack(parts)
    words = text(
        scenario.tensors["in.encoder_hidden_states"],
        scenario.tensors["in.encoder_attention_mask"],
        scenario.tensors["in.pooled_projections"],
        segments=len(lists),
    )
    ratio = scenario.tensors["in.timestep_ratio"]
    time = rearrange(ratio, "(b s) -> b s", s=len(lists)).astype(np.float32)

    out = compiled_velocity(model.cfg, model.params, row, time, words)
    for k, answer in enumerate(_split(out, parts)):
        yield Answer(f"out.{k}", _current(answer, lists[k], model), DIT)
    yield from _before_blocks(model, parts, row, words)
    states = blocks.states(model.cfg, model.params, row, time, words)
    yield from _states(states, parts, words)
    if "in.target.0" in scenario.tensors:
        yield from _gradients(model, scenario, parts, (row, time, words))


def _lists(scenario: Scenario) -> list[list[np.ndarray]]:
    """The clips of every list, oldest first."""
    count = 0
    while f"in.sample.{count}.0" in scenario.tensors:
        count += 1
    return [
        [scenario.latent(name) for name in scenario.family(f"in.sample.{k}.")]
        for k in range(count)
    ]


def _tokens(clips: list[np.ndarray], model: Model) -> Tokens:
    """One list as tokens; its frames count from 0."""
    target = layout.grid(clips[-1], model.layout.patch)
    first, parts = 0, []
    for clip in clips:
        frame = np.arange(first, first + clip.shape[1], dtype=np.int32)
        parts.append(layout.tokens(clip, frame, target, model.layout))
        first += clip.shape[1]
    return layout.join(parts)


def _pack(parts: list[Tokens]) -> Tokens:
    """The lists as segments of the same row."""
    return layout.join([p._replace(segment=p.segment + k) for k, p in enumerate(parts)])


def _split(tokens: Any, parts: list[Tokens]) -> list[np.ndarray]:
    """What belongs to each list of an array with one entry per video token."""
    ends = np.cumsum([part.frame.shape[1] for part in parts])
    return np.split(np.asarray(tokens), ends[:-1], axis=1)


def _current(tokens: Any, clips: list[np.ndarray], model: Model) -> np.ndarray:
    """The velocity of the last clip of a list, as a latent of the recorded layout."""
    grid = layout.grid(clips[-1], model.layout.patch)
    tokens = tokens[:, -clips[-1].shape[1] * grid[0] * grid[1] :]
    return latent_back(layout.unpatchify(tokens, grid, model.layout.patch))


def _before_blocks(
    model: Model, parts: list[Tokens], row: Tokens, words: Text
) -> Iterator[Answer]:
    """Mask and rotary angles. Padding sees padding in the original and nothing here."""
    joint = mask.joint(words.segment, row.segment, row.frame, model.cfg.causal)
    visible = np.asarray(mask.dense_mask(joint))
    m = words.segment.shape[1] // len(parts)
    first = words.segment.shape[1]
    for k, part in enumerate(parts):
        n = part.frame.shape[1]
        own = np.r_[k * m : (k + 1) * m, first : first + n]
        first += n
        seen = visible[:, own][:, :, own]
        valid = np.asarray(joint.segment)[:, own] >= 0
        answer = rearrange(seen, "b q k -> b 1 q k")
        where = rearrange(valid, "b q -> b 1 q 1")
        yield Answer(f"mid.attention_mask.{k}", answer, 0.0, where=where)

        angle = np.asarray(rotary.angles(part.position[:1], model.cfg.rope_axes))
        angle = np.pad(angle, ((0, 0), (m, 0), (0, 0)))
        turn = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
        turn = rearrange(turn, "(i j) b l r -> b l 1 r i j", i=2)
        yield Answer(f"mid.rotary.{k}", turn, DIT)


def _states(
    states: dict[str, Any], parts: list[Tokens], words: Text
) -> Iterator[Answer]:
    """The states between blocks; those of padded text mean nothing."""
    s, m = len(parts), words.segment.shape[1]
    valid = words.segment[..., None] >= 0
    of_text, real = (
        "b (s m) d -> (b s) m d",
        rearrange(valid, "b (s m) d -> (b s) m d", s=s),
    )
    for name, state in states.items():
        state, name = np.asarray(state), f"mid.{name}"
        if name == "mid.tokens":
            for k, part in enumerate(_split(state, parts)):
                yield Answer(f"{name}.{k}", part, DIT)
        elif name.startswith("mid.single"):
            state = _interleaved(state[:, :m], state[:, m:], parts)
            video = np.ones(
                (*parts[0].frame.shape[:1], sum(p.frame.shape[1] for p in parts), 1),
                bool,
            )
            where = _interleaved(valid, video, parts)
            yield Answer(name, state, DIT, where=where)
        elif name == "mid.context":
            yield Answer(name, rearrange(state, of_text, s=s), DIT)
        elif name.endswith(".encoder"):
            yield Answer(name, rearrange(state, of_text, s=s), DIT, where=real)
        elif name == "mid.temb":
            yield Answer(name, rearrange(state, "b s d -> (b s) d"), DIT)
        elif name == "mid.time_proj":
            state = rearrange(state, "b s d -> (b s) d")
            note = "angles reach 1000, where float32 has steps of 6e-5"
            yield Answer(name, state, TIME_FEATURES, note=note)
        else:
            yield Answer(name, state, DIT)


def _interleaved(words: Any, video: Any, parts: list[Tokens]) -> np.ndarray:
    """Text and video tokens of each list in turn, from those of all lists."""
    of_words = np.split(np.asarray(words), len(parts), axis=1)
    pairs = zip(of_words, _split(video, parts), strict=True)
    return np.concatenate([part for pair in pairs for part in pair], axis=1)


def _gradients(
    model: Model, scenario: Scenario, parts: list[Tokens], inputs: tuple[Any, ...]
) -> Iterator[Answer]:
    """Loss and gradients of the packed batch against the recorded targets."""
    targets = [scenario.latent(name) for name in scenario.family("in.target.")]
    flow = [layout.patchify(x, model.layout.patch) for x in targets]
    before = [p.frame.shape[1] - x.shape[1] for p, x in zip(parts, flow, strict=True)]
    target = [
        np.pad(x, ((0, 0), (n, 0), (0, 0))) for x, n in zip(flow, before, strict=True)
    ]
    current = [
        np.arange(p.frame.shape[1]) >= n for p, n in zip(parts, before, strict=True)
    ]
    rows = packed_rows(inputs[0], np.concatenate(current), inputs[2])

    def loss(params: Any) -> jax.Array:
        flow = jnp.concatenate(target, axis=1)
        answer = velocity(model.cfg, params, *inputs)
        return objective.squared_error(answer, flow, rows, len(parts)).loss

    run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    value, gradients = run(model.params)
    yield Answer("out.loss", value, LOSS, relative=True)
    yield from gradient_answers(model, scenario, gradients)


def packed_rows(tokens: Tokens, current: np.ndarray, words: Text) -> Rows:
    """Tokens as clean training rows whose segments train stages 0, 1, ... in turn."""
    b, s, _ = words.pooled.shape
    return Rows(
        clean=tokens.values,
        coarser=np.zeros_like(tokens.values),
        position=tokens.position,
        segment=tokens.segment,
        frame=tokens.frame,
        current=np.broadcast_to(current, tokens.frame.shape),
        stage=np.broadcast_to(np.arange(s), (b, s)),
        text=words.features,
        text_segment=words.segment,
        pooled=words.pooled,
    )


def gradient_answers(
    model: Model, scenario: Scenario, gradients: Any
) -> Iterator[Answer]:
    """Gradients under the original's names, and their norms in the recorded order."""
    named = dict(rename.export_tensors(gradients, model.table))
    order = scenario.settings["grad_param_order"]
    norms = [np.linalg.norm(named[key].astype(np.float64)) for key in order]
    yield Answer("out.grad_norms", norms, LOSS, relative=True)
    for name in scenario.tensors:
        if name.startswith("out.grad."):
            value = named[name.removeprefix("out.grad.")]
            yield Answer(name, value, LOSS, relative=True)
