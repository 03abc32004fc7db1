# SPDX-License-Identifier: Apache-2.0
"""Whole sampling runs with recorded noise, observed through the network's calls.

The sampler asks a velocity function; the one given here writes down what it is asked
and what it answers, so that every unit and stage is compared, not only the video.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from launch.parity import vae
from launch.parity.cases import QUICK, SAMPLING, Answer, Case, Scenario, latent_back
from launch.parity.model import Model, load, recorded_text, text
from launch.parity.model import velocity as network
from pyramid_jax import layout, pyramid, sampler
from pyramid_jax.sampler import Guidance, Noise, SamplerConfig
from pyramid_jax.shapes import Text, Tokens


class Call(NamedTuple):
    """One question to the network (without empty slots) and its answer."""

    values: np.ndarray
    answer: np.ndarray


class Run(NamedTuple):
    """The settings of a recorded call of the original's pipeline, as this package's."""

    cfg: SamplerConfig
    text: Text
    scales: np.ndarray | None
    first: np.ndarray | None
    shape: tuple[int, int, int, int]


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "draw.init_noise" in scenario.tensors


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded sampling run."""
    model = load(case, scenario.settings)
    autoencoder = vae.of_sampling(case)
    run = _settings(scenario, model)
    from_image = run.first is not None
    if from_image and autoencoder is not None:
        run = run._replace(first=vae.first_latent(autoencoder, case, scenario))
    calls: list[Call] = []
    noise = _noise(scenario, run)

    def velocity(tokens: Tokens, time: jax.Array, words: Text) -> jax.Array:
        answer = network(model.cfg, model.params, tokens, time, words)

        def note(values: Any, segment: Any, answer: Any) -> None:
            kept = np.asarray(segment)[0] >= 0
            calls.append(Call(*(np.asarray(x)[:, kept] for x in (values, answer))))

        io_callback(note, None, tokens.values, tokens.segment, answer, ordered=True)
        return answer

    def sample() -> jax.Array:
        canvas = sampler.Canvas(run.shape, noise, run.first)
        return sampler.sample(velocity, run.text, canvas, run.scales, run.cfg)

    latents = jax.jit(sample, compiler_options=QUICK)()
    jax.effects_barrier()
    recorded = from_image and autoencoder is None
    note = "the first latent is the recorded one" * recorded
    yield Answer("out.latents", latent_back(latents), SAMPLING, note=note)
    if autoencoder is not None:
        yield from vae.frames(autoencoder, case, latents)
    yield from _observed(scenario, run, calls)


def _settings(scenario: Scenario, model: Model) -> Run:
    call, given = scenario.settings["call"], scenario.settings.get("pipeline", {})
    stages = pyramid.stages(
        given.get("stage_range", pyramid.THIRDS),
        given.get("timestep_shift", 1.0),
        given.get("scheduler_gamma", 1 / 3),
    )
    from_image = call["function"] == "generate_i2v"
    steps = [_each(call[name], len(stages)) for name in _steps(from_image)]
    gamma = given.get("scheduler_gamma", 1 / 3)
    cfg = SamplerConfig(stages, model.layout, *steps, gamma=gamma)

    _, c, t, h, w = scenario.tensors["out.latents"].shape
    units = layout.units(t, model.layout.frames_per_unit)
    first = scenario.latent("out.latents")[:, :1] if from_image else None
    words = [recorded_text(scenario, "in.pos.")]
    scales = None
    if call["guidance_scale"] > 0:  # of the first frame, which decides for all
        words.insert(0, recorded_text(scenario, "in.neg."))
        scales = _guidance(call).scales(units).astype(np.float32)
    both: Any = [np.concatenate(part) for part in zip(*words, strict=True)]
    return Run(cfg, text(*both), scales, first, (t, h, w, c))


def _steps(from_image: bool) -> tuple[str, str]:
    first = "num_inference_steps"
    return (first, first) if from_image else (first, f"video_{first}")


def _each(steps: int | list[int], stages: int) -> tuple[int, ...]:
    return (steps,) * stages if isinstance(steps, int) else tuple(steps)


def _guidance(call: dict[str, Any]) -> Guidance:
    first, video = call["guidance_scale"], call["video_guidance_scale"]
    if call.get("use_linear_guidance"):
        decay, floor = call.get("alpha", 0.5), call.get("min_guidance_scale", 2.0)
        return Guidance(first, video, decay, floor)
    return Guidance(first, video)


def _noise(scenario: Scenario, run: Run) -> Any:
    """(unit, frames) -> recorded noise; after a given first frame, that of unit 1."""
    stages = len(run.cfg.stages)
    white = scenario.latent("draw.init_noise")
    start = jnp.asarray(pyramid.noise_levels(white, stages)[0])
    shift = 0 if run.first is None else 1
    per_unit = run.cfg.layout.frames_per_unit
    units = layout.units(run.shape[0], per_unit)

    def jump(unit: int, stage: int) -> np.ndarray:
        return scenario.latent(f"draw.unit{unit}.stage{stage}.block_noise")

    later = [
        jnp.stack([jump(u, k) for u in range(1, units)])
        for k in range(1, stages)
        if units > 1
    ]

    def noise(unit: int | jax.Array, frames: int) -> Noise:
        if isinstance(unit, int):
            return Noise(
                start[:, :frames],
                tuple(jnp.asarray(jump(0, k)) for k in range(1, stages)),
            )
        at = (unit - 1) * per_unit + 1 - shift
        begin = jax.lax.dynamic_slice_in_dim(start, at, frames, axis=1)
        return Noise(begin, tuple(x[unit - 1] for x in later))

    return noise


def _observed(scenario: Scenario, run: Run, calls: list[Call]) -> Iterator[Answer]:
    """Starts, histories, first answers and ends of every stage of every unit."""
    cfg, left = run.cfg, iter(calls)
    units = layout.units(run.shape[0], cfg.layout.frames_per_unit)
    for unit in range(run.first is not None, units):
        steps = cfg.video_steps if unit else cfg.first_steps
        scale = None if run.scales is None else float(run.scales[unit])
        for k in range(len(cfg.stages)):
            mine = [next(left) for _ in range(steps[k])]
            name = f"unit{unit}.stage{k}"
            past = scenario.family(f"mid.{name}.history")
            clips = [scenario.tensors[clip].shape for clip in past]
            shapes = [*clips, scenario.tensors[f"out.{name}"].shape]
            patch = cfg.layout.patch
            seen = _clips(mine[0].values, shapes, patch)
            names = [*past, f"mid.{name}.latent_start"]
            for clip, value in zip(names, seen, strict=True):
                yield Answer(clip, value, SAMPLING)
            answers = [_clips(call.answer, shapes, patch)[-1] for call in mine]
            yield Answer(f"mid.{name}.model_out0", answers[0], SAMPLING)
            x = _clips(mine[-1].values, shapes, patch)[-1]
            yield Answer(
                f"out.{name}", _last_step(x, answers[-1], steps[k], scale), SAMPLING
            )


def _last_step(
    x: np.ndarray, answer: np.ndarray, steps: int, scale: float | None
) -> np.ndarray:
    """Where the last Euler step of a stage leads from `x`."""
    sigma, end = pyramid.sigmas(steps)[-2:]
    if scale is None:
        return pyramid.euler(x, answer, sigma, end)
    negative, positive = np.split(answer, 2)
    guided = negative + scale * (positive - negative)
    return pyramid.euler(np.split(x, 2)[1], guided, sigma, end)


def _clips(
    values: np.ndarray, shapes: list[tuple[int, ...]], patch: int
) -> list[np.ndarray]:
    """The last clips of a row of tokens, of the recorded shapes, oldest first."""
    found = []
    for _, _, t, h, w in reversed(shapes):
        grid = (h // patch, w // patch)
        values, part = np.split(values, [-t * grid[0] * grid[1]], axis=1)
        found.append(latent_back(layout.unpatchify(part, grid, patch)))
    return found[::-1]
