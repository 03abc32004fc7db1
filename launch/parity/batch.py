# SPDX-License-Identifier: Apache-2.0
"""A recorded training batch as clean rows and draws.

A batch of the original has columns, each of one stage; here a column is a batch of
rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.parity.cases import TARGETS, Answer, Scenario, latent_back
from pyramid_jax import layout, objective, pyramid
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.objective import Draws, HistoryNoise
from pyramid_jax.shapes import Rows

noisy = jax.jit(objective.noisy, static_argnums=(2, 3))


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
    noise: HistoryNoise
    answers: list[Answer]  # to the latents' pyramid and the units


def read(scenario: Scenario, cut: Layout) -> Batch:
    """The batch of a scenario, cut into tokens like `cut`."""
    settings = {**scenario.settings, **scenario.settings.get("pipeline", {})}
    settings |= settings.get("pipe", {})
    stages = pyramid.stages(
        settings.get("stage_range", pyramid.THIRDS),
        settings.get("timestep_shift", 1.0),
        settings.get("scheduler_gamma", 1 / 3),
    )
    cut = Layout(
        cut.patch,
        settings.get("frame_per_unit", 1),
        cut.position_table,
        cut.interpolate,
    )
    latents = _latent_config(settings).normalise(scenario.latent("in.latents"))
    levels = pyramid.levels(latents, len(stages))
    noise = pyramid.noise_levels(scenario.latent("draw.noise"), len(stages))
    answers = [
        Answer(name, latent_back(levels[k]), TARGETS)
        for k, name in enumerate(scenario.family("mid.pyramid."))
    ]
    units = _units(settings, latents.shape[1], len(stages))
    if "mid.num_units_per_stage" in scenario.tensors:
        lengths = [unit + 1 for unit in units]
        answers.append(Answer("mid.num_units_per_stage", lengths, 0.0))
    ratios = settings.get("sample_ratios", [1] * len(stages))
    of_column = [k for k, ratio in enumerate(ratios) for _ in range(ratio)]
    columns = []
    for index, stage in enumerate(of_column):
        clips = _clips(settings, stage, units[stage], latents.shape[1])
        mine = slice(index, None, len(of_column))
        z = _white(scenario, index, clips, noise[stage][mine], cut)
        own = [level[mine] for level in levels]
        columns.append(_column(scenario, index, own, clips, z, cut))
    noise = HistoryNoise(settings.get("corrupt_ratio", 1 / 3))
    return Batch(columns, stages, cut, noise, answers)


def _latent_config(settings: dict[str, Any]) -> LatentConfig:
    return LatentConfig(
        image_shift=settings["vae_shift_factor"],
        image_scale=settings["vae_scale_factor"],
        video_shift=settings["vae_video_shift_factor"],
        video_scale=settings["vae_video_scale_factor"],
    )


def _units(settings: dict[str, Any], frames: int, stages: int) -> list[int]:
    """The unit that each stage trains."""
    if settings["mode"] != "temporal":
        return [0] * stages
    per_unit = settings.get("frame_per_unit", 1)
    count = layout.units(settings["max_temporal_length"], per_unit)
    before = settings.get(
        "accumulate_steps", settings.get("accumulate_steps_before_call", 0)
    )
    group = settings["video_sync_group"]
    turn = turn_of(settings.get("rank", 0), before + 1, group, count)
    available = layout.units(frames, per_unit)
    fine, coarse = layout.balanced_units(turn, count, available)
    return [coarse] * (stages - 1) + [fine]


def _clips(
    settings: dict[str, Any], stage: int, unit: int, frames: int
) -> tuple[Clip, ...]:
    """What is trained: a unit with its past, or the whole sequence at once."""
    if settings["mode"] != "temporal":
        return (Clip(stage, np.arange(frames)),)
    per_unit = settings.get("frame_per_unit", 1)
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
    segments = [layout.segment([x[i] for x in levels], clips, cut) for i in range(b)]
    clean, coarser, position, frame, current = map(
        np.stack, zip(*segments, strict=True)
    )
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


def latents(tokens: Any, column: Column, cut: Layout) -> list[np.ndarray]:
    """The clips of a column as latents of the recorded layout."""
    grids, tokens = [], np.asarray(tokens)
    for t, h, w in column.shapes:
        grid = (h // cut.patch, w // cut.patch)
        part, tokens = np.split(tokens, [t * grid[0] * grid[1]], axis=1)
        grids.append(latent_back(layout.unpatchify(part, grid, cut.patch)))
    return grids


def turn_of(rank: int, call: int, group: int, count: int) -> int:
    """The turn of a rank at a call: ranks of a group take successive ones."""
    return rank % group + call % (count // group) * group
