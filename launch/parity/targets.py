# SPDX-License-Identifier: Apache-2.0
"""The training objective: noisy inputs and targets, whole steps, units per stage.

A batch of the original has columns, each of one stage; here a column is a batch of
rows. In a whole step the columns are the segments of packed rows.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from launch.parity.cases import (
    DIT,
    LOSS,
    SCHEDULE,
    TARGETS,
    Answer,
    Case,
    Scenario,
    latent_back,
)
from launch.parity.dit import gradient_answers
from launch.parity.model import load, text
from pyramid_jax import layout, objective, pyramid
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.objective import Draws
from pyramid_jax.shapes import Rows, Tokens


class Column(NamedTuple):
    """The samples of a batch that train one stage: rows, recorded draws and clips."""

    stage: int
    rows: Rows
    draws: Draws
    shapes: list[tuple[int, ...]]  # t, h, w of the clips, oldest first


class Batch(NamedTuple):
    """A recorded batch and the settings that it was made with."""

    columns: list[Column]
    stages: tuple[pyramid.Stage, ...]
    layout: Layout
    corrupt: float
    answers: list[Answer]


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "draw.noise" in scenario.tensors or set(scenario.tensors) == {"table"}


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded training batch, step or table of units."""
    if "table" in scenario.tensors:
        yield Answer("table", _units_table(scenario.tensors["table"]), 0.0)
        return
    whole_step = "in.prompt_embeds" in scenario.tensors
    model = load(case, scenario.settings) if whole_step else None
    batch = _batch(scenario, model.layout if model else Layout())
    if model:
        yield from _step(scenario, model, batch)
        return
    yield from batch.answers
    for index, column in enumerate(batch.columns):
        example = objective.noisy(
            column.rows, column.draws, batch.stages, batch.corrupt
        )
        yield from _inputs(f"out.col{index}", column, example, batch)


def _units_table(recorded: np.ndarray) -> np.ndarray:
    """Units per stage of every recorded rank and call, as prefix lengths."""
    rows = []
    for row in recorded.tolist():
        frames, per_unit, group, most, rank, call = row[:6]
        count = layout.units(frames, per_unit)
        available = count if most < 0 else most
        turn = _turn(rank, call, group, count)
        fine, coarse = layout.balanced_units(turn, count, available)
        rows.append([*row[:6], coarse + 1, coarse + 1, fine + 1])
    return np.array(rows)


def _turn(rank: int, call: int, group: int, count: int) -> int:
    """The turn of a rank at a call: ranks of a group take successive ones."""
    return rank % group + call % (count // group) * group


# ------------------------------------------------------------------------------ a batch


def _batch(scenario: Scenario, cut: Layout) -> Batch:
    given = {**scenario.settings, **scenario.settings.get("pipeline", {})}
    given |= given.get("pipe", {})
    stages = pyramid.stages(
        given.get("stage_range", pyramid.THIRDS),
        given.get("timestep_shift", 1.0),
        given.get("scheduler_gamma", 1 / 3),
    )
    cut = Layout(cut.patch, given.get("frame_per_unit", 1), cut.table, cut.interpolate)
    latents = _latent_config(given).normalise(scenario.latent("in.latents"))
    levels = pyramid.levels(latents, len(stages))
    noise = pyramid.noise_levels(scenario.latent("draw.noise"), len(stages))
    answers = [
        Answer(name, latent_back(levels[k]), TARGETS)
        for k, name in enumerate(scenario.family("mid.pyramid."))
    ]
    chosen = _units(given, latents.shape[1], len(stages))
    if "mid.num_units_per_stage" in scenario.tensors:
        lengths = [unit + 1 for unit in chosen]
        answers.append(Answer("mid.num_units_per_stage", lengths, 0.0))
    ratios = given.get("sample_ratios", [1] * len(stages))
    of_column = [k for k, ratio in enumerate(ratios) for _ in range(ratio)]
    columns = []
    for index, stage in enumerate(of_column):
        clips = _clips(given, stage, chosen[stage], latents.shape[1])
        mine = slice(index, None, len(of_column))
        z = _white(scenario, index, clips, noise[stage][mine], cut)
        own = [level[mine] for level in levels]
        columns.append(_column(scenario, index, own, clips, z, cut))
    corrupt = given.get("corrupt_ratio", 1 / 3)
    return Batch(columns, stages, cut, corrupt, answers)


def _latent_config(given: dict[str, Any]) -> LatentConfig:
    return LatentConfig(
        image_shift=given["vae_shift_factor"],
        image_scale=given["vae_scale_factor"],
        video_shift=given["vae_video_shift_factor"],
        video_scale=given["vae_video_scale_factor"],
    )


def _units(given: dict[str, Any], frames: int, stages: int) -> list[int]:
    """The unit that each stage trains."""
    if given["mode"] != "temporal":
        return [0] * stages
    per_unit = given.get("frame_per_unit", 1)
    count = layout.units(given["max_temporal_length"], per_unit)
    before = given.get("accumulate_steps", given.get("accumulate_steps_before_call", 0))
    group = given["video_sync_group"]
    turn = _turn(given.get("rank", 0), before + 1, group, count)
    available = layout.units(frames, per_unit)
    fine, coarse = layout.balanced_units(turn, count, available)
    return [coarse] * (stages - 1) + [fine]


def _clips(
    given: dict[str, Any], stage: int, unit: int, frames: int
) -> tuple[Clip, ...]:
    """What is trained: a unit with its past, or the whole sequence at once."""
    if given["mode"] != "temporal":
        return (Clip(stage, np.arange(frames)),)
    per_unit = given.get("frame_per_unit", 1)
    return layout.compact(layout.clips(stage, unit, unit + 1, per_unit))


def _white(
    scenario: Scenario,
    column: int,
    clips: tuple[Clip, ...],
    noise: np.ndarray,
    cut: Layout,
) -> np.ndarray:
    """The recorded noise of a column as tokens; history was recorded newest first."""
    past = scenario.family(f"draw.col{column}.hist_noise")[::-1]
    latents = [scenario.latent(name) for name in past]
    latents.append(noise[:, clips[-1].frame])
    tokens = [layout.patchify(x, cut.patch) for x in latents]
    return np.concatenate(tokens, axis=1).astype(np.float32)


def _column(
    scenario: Scenario,
    index: int,
    levels: list[np.ndarray],
    clips: tuple[Clip, ...],
    z: np.ndarray,
    cut: Layout,
) -> Column:
    """The samples of a column as rows of one segment, with its recorded draws."""
    b, stage = len(z), clips[-1].stage
    made = [layout.segment([x[i] for x in levels], clips, cut) for i in range(b)]
    clean, coarser, position, frame, current = map(np.stack, zip(*made, strict=True))
    empty = np.zeros((b, 0), np.int32)
    rows = Rows(
        clean=clean,
        coarser=coarser,
        position=position,
        segment=np.zeros_like(frame),
        frame=frame,
        current=current,
        stage=np.full((b, 1), stage),
        text=empty,
        text_segment=empty,
        pooled=np.zeros((b, 1, 0), np.float32),
    )
    level, corruption = (
        jnp.asarray(scenario.tensors[f"draw.col{index}.{name}"][:, None])
        for name in ("u", "corrupt_u")
    )
    past = scenario.family(f"draw.col{index}.hist_noise")[::-1]
    shapes = [scenario.tensors[name].shape[2:] for name in past]
    shapes.append((len(clips[-1].frame), *levels[stage].shape[2:4]))
    return Column(stage, rows, Draws(level, corruption, jnp.asarray(z)), shapes)


def _inputs(
    name: str, column: Column, example: objective.Example, batch: Batch
) -> Iterator[Answer]:
    """What the network of a column is given, and asked for."""
    clips = _latents(example.tokens.values, column, batch.layout)
    for j, clip in enumerate(clips):
        yield Answer(f"{name}.input.{j}", clip, TARGETS)
    target = _latents(example.target, column, batch.layout)[-1]
    yield Answer(f"{name}.target", target, TARGETS)
    scale = SCHEDULE * pyramid.TIME_SCALE
    yield Answer(f"{name}.timesteps", example.time[:, 0], scale)
    stage = batch.stages[column.stage]
    sigma = (example.time - stage.time_end) / (stage.time_start - stage.time_end)
    sigma = rearrange(np.asarray(sigma), "b 1 -> b 1 1 1 1")
    yield Answer(f"{name}.ratios", sigma, TARGETS, note="what the time implies")


def _latents(tokens: Any, column: Column, cut: Layout) -> list[np.ndarray]:
    """The clips of a column as latents of the recorded layout."""
    found, tokens = [], np.asarray(tokens)
    for t, h, w in column.shapes:
        grid = (h // cut.patch, w // cut.patch)
        part, tokens = np.split(tokens, [t * grid[0] * grid[1]], axis=1)
        found.append(latent_back(layout.unpatchify(part, grid, cut.patch)))
    return found


# ---------------------------------------------------------------------- a training step


def _step(scenario: Scenario, model: Any, batch: Batch) -> Iterator[Answer]:
    """Prediction, target, loss and gradients of the columns as packed rows."""
    columns = batch.columns
    rows, draws = _packed(columns)
    words, valid = _text(scenario, len(columns))
    if "mid.encoder_attention_mask" in scenario.tensors:
        yield Answer("mid.encoder_attention_mask", valid, 0.0)
    apply, kept = model.apply(), {}

    def loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        def velocity(tokens: Tokens, time: jax.Array, text: Any) -> jax.Array:
            kept["time"] = time
            kept["pred"] = apply(params, tokens, time, text)
            return kept["pred"]

        found = objective.loss(
            velocity, rows, words, draws, batch.stages, batch.corrupt
        )
        return found.loss, (kept["pred"], kept["time"])

    (value, (pred, time)), gradients = jax.value_and_grad(loss, has_aux=True)(
        model.params
    )
    target = objective.noisy(rows, draws, batch.stages, batch.corrupt).target
    ends = np.cumsum([c.rows.clean.shape[1] for c in columns])[:-1]
    for kind, tokens, limit in (("pred", pred, DIT), ("target", target, TARGETS)):
        parts = np.split(np.asarray(tokens), ends, axis=1)
        for k, (part, column) in enumerate(zip(parts, columns, strict=True)):
            latent = _latents(part, column, batch.layout)[-1]
            yield Answer(f"mid.{kind}.{k}", latent, limit)
    scale = SCHEDULE * pyramid.TIME_SCALE
    yield Answer("mid.model_timesteps", rearrange(time, "b s -> (b s)"), scale)
    yield Answer("out.loss", value, LOSS, relative=True)
    yield from gradient_answers(model, scenario, gradients)


def _packed(columns: list[Column]) -> tuple[Rows, Draws]:
    """The columns as segments of the same rows."""

    def join(parts: Any) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in parts], axis=1)

    rows = Rows(
        *(join(field) for field in zip(*(c.rows for c in columns), strict=True))
    )
    segment = join(c.rows.segment + k for k, c in enumerate(columns))
    draws = Draws(
        *(join(field) for field in zip(*(c.draws for c in columns), strict=True))
    )
    return rows._replace(segment=segment), draws


def _text(scenario: Scenario, segments: int) -> tuple[Any, np.ndarray]:
    """The text of the packed rows with recorded caption dropping, and its mask."""
    tensors = scenario.tensors
    dropped = tensors["draw.drop_u"] <= scenario.settings["cfg_rate"]
    parts = []
    for given, null in (
        ("prompt_embeds", "prompt_embed"),
        ("prompt_attention_mask", "prompt_attention_mask"),
        ("pooled_prompt_embeds", "pooled_prompt_embed"),
    ):
        kept, empty = tensors[f"in.{given}"], tensors[f"in.null.{null}"][None]
        drop = dropped.reshape((-1,) + (1,) * (kept.ndim - 1))
        parts.append(np.where(drop, empty, kept))
    return text(*parts, segments=segments), parts[1]
