# SPDX-License-Identifier: Apache-2.0
"""The training objective: noisy inputs and targets, and the units that stages train."""

from collections.abc import Iterator

import numpy as np
from einops import rearrange

from launch.parity import batch as batches
from launch.parity.batch import Batch, Column
from launch.parity.cases import SCHEDULE, TARGETS, Answer, Case, Scenario
from pyramid_jax import layout, objective, pyramid
from pyramid_jax.layout import Layout


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    bare = (
        "draw.noise" in scenario.tensors and "in.prompt_embeds" not in scenario.tensors
    )
    return bare or set(scenario.tensors) == {"table"}


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded training batch or table of units."""
    if "table" in scenario.tensors:
        yield Answer("table", _units_table(scenario.tensors["table"]), 0.0)
        return
    batch = batches.read(scenario, Layout())
    yield from batch.answers
    for index, column in enumerate(batch.columns):
        example = batches.noisy(column.rows, column.draws, batch.stages, batch.noise)
        yield from _inputs(f"out.col{index}", column, example, batch)


def _units_table(recorded: np.ndarray) -> np.ndarray:
    """Units per stage of every recorded rank and call, as prefix lengths."""
    rows = []
    for row in recorded.tolist():
        frames, per_unit, group, most, rank, call = row[:6]
        count = layout.units(frames, per_unit)
        available = count if most < 0 else most
        turn = batches.turn_of(rank, call, group, count)
        fine, coarse = layout.balanced_units(turn, count, available)
        rows.append([*row[:6], coarse + 1, coarse + 1, fine + 1])
    return np.array(rows)


def _inputs(
    name: str, column: Column, example: objective.NoisyRow, batch: Batch
) -> Iterator[Answer]:
    """What the network of a column is given, and asked for."""
    clips = batches.latents(example.tokens.values, column, batch.layout)
    for j, clip in enumerate(clips):
        yield Answer(f"{name}.input.{j}", clip, TARGETS)
    target = batches.latents(example.target, column, batch.layout)[-1]
    yield Answer(f"{name}.target", target, TARGETS)
    scale = SCHEDULE * pyramid.TIME_SCALE
    yield Answer(f"{name}.timesteps", example.time[:, 0], scale)
    stage = batch.stages[column.stage]
    sigma = (example.time - stage.time_end) / (stage.time_start - stage.time_end)
    sigma = rearrange(np.asarray(sigma), "b 1 -> b 1 1 1 1")
    yield Answer(f"{name}.ratios", sigma, TARGETS, note="what the time implies")
