# SPDX-License-Identifier: Apache-2.0
"""The noise schedule: tables, inference steps, Euler steps, jumps between stages."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from launch.parity.batch import noisy
from launch.parity.cases import SCHEDULE, Answer, Case, Scenario, latent_back
from pyramid_jax import pyramid
from pyramid_jax.objective import Draws
from pyramid_jax.pyramid import TIME_SCALE, Stage
from pyramid_jax.shapes import Rows

TIMES = SCHEDULE * TIME_SCALE  # the clock runs from 1000


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "scheduler" in scenario.settings


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to recorded tables, step sizes, Euler chains or jumps."""
    settings = scenario.settings["scheduler"]
    stages = pyramid.stages(
        settings["stage_range"], settings["shift"], settings["gamma"]
    )
    names = set(scenario.tensors)
    if "global_sigmas" in names:
        yield from _tables(stages, settings)
    for name in sorted(names):
        if name.startswith("steps"):
            yield _steps(name, stages)
        if name.endswith("_prev_samples"):
            yield _euler(scenario, name)
    if "block_covariance" in names:
        yield from _jumps(scenario, stages, settings["gamma"])


def _tables(stages: tuple[Stage, ...], settings: dict[str, Any]) -> Iterator[Answer]:
    start = [1 - s.start for s in stages]
    end = [1 - s.end for s in stages]
    before = [_global(0, settings), *end[:-1]]
    yield Answer("start_sigmas", start, SCHEDULE)
    yield Answer("end_sigmas", end, SCHEDULE)
    yield Answer("ori_start_sigmas", before, SCHEDULE)

    table = np.array([_global(i, settings) for i in range(TIME_SCALE)])
    yield Answer("global_sigmas", table, SCHEDULE)
    yield Answer("global_timesteps", table * TIME_SCALE, TIMES)
    yield Answer("sigma_max", table[0], SCHEDULE)
    yield Answer("sigma_min", table[-1], SCHEDULE)

    removed = np.cumsum([0.0, *np.subtract(start, end)])
    bounds = removed / removed[-1]
    yield Answer("timestep_ratios", np.stack([bounds[:-1], bounds[1:]], 1), SCHEDULE)
    times, sigmas = zip(
        *(_training(k, stages) for k in range(len(stages))), strict=True
    )
    yield Answer("timesteps_per_stage", times, TIMES)
    yield Answer("sigmas_per_stage", sigmas, SCHEDULE)


def _global(index: int, settings: dict[str, Any]) -> float:
    """Noise at an entry of the table of 1000: that of a stage which ends there."""
    if index == 0:
        return 1 - pyramid.stages((0, 1), settings["shift"], settings["gamma"])[0].start
    edges = (0, (index + 0.5) / TIME_SCALE, 1)  # the table's index is truncated
    return 1 - pyramid.stages(edges, settings["shift"], settings["gamma"])[0].end


def _training(k: int, stages: tuple[Stage, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Times and sigmas of a stage as the objective draws them, all 1000.

    On clean data of 1, with neither noise nor coarser level, a token is (1 - sigma)·e.
    """
    n = TIME_SCALE
    one, zero = np.ones((n, 1, 1), np.float32), np.zeros((n, 1), np.int32)
    rows = Rows(
        clean=one,
        coarser=0 * one,
        position=np.zeros((n, 1, 3), np.float32),
        segment=zero,
        frame=zero,
        current=zero == 0,
        stage=zero + k,
        text=zero,
        text_segment=zero,
        pooled=one,
    )
    level = jnp.asarray((np.arange(n)[:, None] + 0.5) / n, jnp.float32)
    draws = Draws(level, level, jnp.zeros((n, 1, 1)))
    example = noisy(rows, draws, stages)
    values = np.asarray(example.tokens.values, np.float64)[:, 0, 0]
    return np.asarray(example.time)[:, 0], 1 - values / stages[k].end


def _steps(name: str, stages: tuple[Stage, ...]) -> Answer:
    """Times or sigmas of an inference of so many steps, e.g. for steps10_timesteps."""
    count, kind = name.removeprefix("steps").split("_")
    sigmas = pyramid.sigmas(int(count))
    if kind == "sigmas":
        return Answer(name, [sigmas] * len(stages), SCHEDULE)
    return Answer(name, [pyramid.time(sigmas[:-1], s) for s in stages], TIMES)


def _euler(scenario: Scenario, name: str) -> Answer:
    """The chain of Euler steps along recorded network outputs."""
    stage = name.removesuffix("_prev_samples")
    x = scenario.tensors[f"{stage}_sample_in"]
    outputs = scenario.tensors[f"{stage}_model_outputs"]
    sigmas, chain = pyramid.sigmas(len(outputs)), []
    for v, sigma, following in zip(outputs, sigmas, sigmas[1:], strict=False):
        x = pyramid.euler(x, v, float(sigma), float(following))
        chain.append(x)
    # A step rounds to the spacing of float32 near the largest value, about 1e-6 here.
    return Answer(name, np.stack(chain), SCHEDULE, relative=True)


def _jumps(
    scenario: Scenario, stages: tuple[Stage, ...], gamma: float
) -> Iterator[Answer]:
    pixel, block = np.ones((1, 1, 1)), np.ones((2, 2, 1))
    gains = [
        [
            pyramid.jump(x * pixel, n * block, s.start, gamma)[0, 0, 0]
            for s in stages[1:]
        ]
        for x, n in ((1, 0), (0, 1))
    ]
    yield Answer("alpha", gains[0], SCHEDULE)
    yield Answer("beta", gains[1], SCHEDULE)
    for k, stage in enumerate(stages[1:], start=1):
        x = scenario.latent(f"stage{k}_latents_in")
        n = scenario.latent(f"stage{k}_block_noise")
        yield Answer(f"stage{k}_upsampled", latent_back(pyramid.up(x)), SCHEDULE)
        jumped = latent_back(pyramid.jump(x, n, stage.start, gamma))
        yield Answer(f"stage{k}_renoised", jumped, SCHEDULE)
        noise = _blocks(n)
        yield from _recorded_noise(f"stage{k}_block_noise", noise, gamma)
    yield from _covariance(scenario, gamma)


def _covariance(scenario: Scenario, gamma: float) -> Iterator[Answer]:
    """Exact moments of block noise, and estimates from the original's samples."""
    zero = jnp.zeros((2, 2, 1))
    factor = jax.jacobian(lambda z: pyramid.block_noise(z, gamma).ravel())(zero)
    factor = np.asarray(factor, np.float64).reshape(4, 4)
    covariance = factor @ factor.T
    yield Answer("block_covariance", covariance, SCHEDULE)
    theirs = scenario.tensors["block_cholesky"].astype(np.float64)
    note = "any factor will do: the covariances are compared"
    yield Answer(
        "block_cholesky", covariance, SCHEDULE, recorded=theirs @ theirs.T, note=note
    )
    samples = scenario.settings["block_noise_estimate_samples"]
    note, bound = "five standard errors", 5 / math.sqrt(samples)
    yield Answer("estimated_mean", np.zeros(4), bound, note=note)
    bound *= math.sqrt(2)
    yield Answer("estimated_covariance", covariance, bound, note=note)
    # Sums of a block are normal; the largest of so many is known to about a tenth.
    largest = math.sqrt(max(covariance.sum(), 0) * 2 * math.log(samples))
    yield Answer(
        "estimated_max_abs_block_sum",
        largest,
        0.15 * largest + 3e-3,
        note="extreme value",
    )


def _blocks(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b t (h i) (w j) c -> (b t h w c) (i j)", i=2, j=2)


def _recorded_noise(name: str, blocks: np.ndarray, gamma: float) -> Iterator[Answer]:
    """The recorded draw lies in the space of our block noise and has its covariance."""
    expected = np.full((4, 4), -gamma) + (1 + gamma) * np.eye(4)
    covariance = blocks.T.astype(np.float64) @ blocks / len(blocks)
    bound = 5 * math.sqrt(2 / len(blocks))
    note = "its covariance, five standard errors"
    yield Answer(name, expected, bound, recorded=covariance, note=note)
